"""The commands that judge one side by its own file: `replay` and `noise`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import (
    ENGINE,
    SIDE,
    JsonOut,
    Prompt,
    PromptFile,
    ReportDir,
    TokenIds,
    Wrap,
    WrapOption,
    arithmetic_option,
    check_prompt,
    token_ids,
    valid_arithmetic,
)
from aprjax.console import show


def _preset_or_auto(name: str | None) -> str | None:
    return name if name == "auto" else valid_arithmetic(name)


@command
def replay(
    side: Annotated[str, typer.Argument(metavar="SIDE", help=f"The trace to judge: {ENGINE}.")],
    *,
    file: Annotated[Path, typer.Option(metavar="FILE", help=f"The {SIDE} that it claims to have run.")],
    arithmetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|auto", callback=_preset_or_auto, help="How the engine computes; auto tries every preset."
        ),
    ] = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    force_file: Annotated[
        bool, typer.Option("--force-file", help="Judge by FILE although the trace is of another SHA-256.")
    ] = False,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Find the nodes of one trace that its file does not explain, given each node's own inputs."""
    check_prompt(prompt, prompt_file, tokens, wrap)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.counted import counted_progress
    from aprjax.bisect.replay.command import render, replay_side
    from aprjax.trace.sides import NoTokens

    check_destinations(json_out, report)
    with counted_progress() as bar:
        try:
            found = replay_side(
                side,
                file,
                arithmetic=arithmetic,
                force_file=force_file,
                prompt=prompt,
                prompt_file=prompt_file,
                tokens=token_ids(tokens),
                times=wrap.value,
                progress=bar,
            )
        except NoTokens as error:
            raise typer.BadParameter(str(error)) from None
    show(lambda console: render(found, console), found.to_json(), json_out)
    if report is not None:
        from aprjax.bisect.replay.html import write_report

        print(f"report: {write_report(found, report)}", file=sys.stderr)
    return found.verdict.exit_code


@command
def noise(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"A {SIDE}.")],
    *,
    arithmetic: Annotated[str, arithmetic_option("it")] = "llama.cpp",
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    engine: Annotated[bool, typer.Option(help="Also run llama.cpp's own variants, if the file is GGUF.")] = True,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Measure how far a file differs from itself when only the order or precision of its sums changes."""
    check_prompt(prompt, prompt_file, tokens, wrap)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.counted import counted_progress
    from aprjax.bisect.noise.report import noise_of, render

    check_destinations(json_out, report)
    with counted_progress() as bar:
        found = noise_of(
            file,
            prompt=prompt,
            prompt_file=prompt_file,
            tokens=token_ids(tokens),
            times=wrap.value,
            arithmetic=arithmetic,
            engine=engine,
            progress=bar,
        )
    show(lambda console: render(found, console), found.to_json(), json_out)
    if report is not None:
        from aprjax.bisect.noise.html import write_report

        print(f"report: {write_report(found, report)}", file=sys.stderr)
    return 0
