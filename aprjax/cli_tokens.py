"""The command `tokens`: what two sides are fed, and whether it is what the prompt meant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import (
    JsonOut,
    Model,
    Prompt,
    PromptFile,
    Ref,
    ReportDir,
    TokenIds,
    Wrap,
    WrapOption,
    check_prompt,
    token_ids,
)
from aprjax.console import show


@command
def tokens(
    *,
    model: Model,
    ref: Ref,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    token_list: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    engine: Annotated[bool, typer.Option(help="Also ask llama.cpp about each GGUF file, if it is installed.")] = True,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Compare what two sides are fed: token ids, special tokens, stop tokens, chat templates.

    Without a prompt the tokens of a saved trace are compared, or those of three probes.
    """
    check_prompt(prompt, prompt_file, token_list, wrap)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.open_sides import open_two
    from aprjax.bisect.tokens.compare import compare_tokens
    from aprjax.bisect.tokens.render import render
    from aprjax.text.prompt import read_prompt_file

    check_destinations(json_out, report)
    text = prompt if prompt_file is None else read_prompt_file(prompt_file)
    found = compare_tokens(open_two(model, ref), text=text, times=wrap.value, ids=token_ids(token_list), engine=engine)
    document = found.to_json()
    show(lambda console: render(found, console), document, json_out)
    if report is not None:
        from aprjax.bisect.page import write_report

        print(f"report: {write_report(document, report)}", file=sys.stderr)
    return found.verdict.exit_code
