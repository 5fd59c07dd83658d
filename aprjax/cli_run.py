"""The command `run`: text from one checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_mesh import over_devices
from aprjax.cli_options import (
    SIDE,
    JsonOut,
    Prompt,
    PromptFile,
    TokenIds,
    Wrap,
    WrapOption,
    arithmetic_option,
    check_prompt,
    token_ids,
)
from aprjax.console import show

# Upstream's evidence for SHIP-002 was made with `--max-tokens 128`.
DEFAULT_BUDGET = 128
DIVERGES = 1


@command
@over_devices
def run(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"A {SIDE}.")],
    *,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="The most tokens that are made.")
    ] = DEFAULT_BUDGET,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; 1 the model's own distribution.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the K likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that have this probability together.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the random numbers; by default another every time.")
    ] = None,
    arithmetic: Annotated[str, arithmetic_option("it")] = "llama.cpp",
    ignore_stop: Annotated[bool, typer.Option("--ignore-stop", help="Go on behind the file's stop tokens.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="IDS", help="Further token ids to stop at: 13,198.")] = None,
    python_check: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Parse the Python of the answer (SHIP-002), and write the evidence here."),
    ] = None,
    json_out: JsonOut = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show what is fed, to the token.")] = False,
) -> int:
    """Continue a prompt: text to stdout as it comes, everything else to stderr.

    The prompt is fed as it is, unless --wrap says otherwise. With --python-check the exit code is 1 where the answer's
    Python does not parse.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    if prompt is None and prompt_file is None and tokens is None:
        raise typer.BadParameter("give --prompt, --prompt-file or --tokens")
    if re.match(r"(llama\.cpp(\[.*\])?|hf):", file):
        raise typer.BadParameter(
            f"run computes itself, from a {SIDE}: other engines are sides of `generate`, `trace` …"
        )
    ids, stops = token_ids(tokens), frozenset(token_ids(stop) or ())
    from aprjax.bisect.asked import check_destinations
    from aprjax.qwen2.run_command import run_file
    from aprjax.qwen2.sampling import Sampling
    from aprjax.text.tokenizer import TextError

    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    check_destinations(json_out)
    try:
        outcome = run_file(
            file,
            prompt=prompt,
            prompt_file=prompt_file,
            tokens=ids,
            times=wrap.value,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            arithmetic=arithmetic,
            ignore_stop=ignore_stop,
            stop_ids=stops,
            python_check=python_check,
            digest=json_out is not None,
            streams=json_out != "-",
            verbose=verbose,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except TextError as error:
        raise typer.BadParameter(str(error)) from None
    if json_out is not None:
        show(lambda console: None, outcome.to_json(), json_out)
    return 0 if outcome.passes else DIVERGES
