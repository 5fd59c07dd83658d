"""The command that says why a trace is not what its file gives: `explain`."""

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
    check_prompt,
    token_ids,
    valid_arithmetic,
)
from aprjax.console import show


def _preset_or_auto(name: str | None) -> str | None:
    return name if name == "auto" else valid_arithmetic(name)


@command
def explain(
    side: Annotated[str, typer.Argument(metavar="SIDE", help=f"What to explain: {ENGINE}, or a {SIDE}.")],
    *,
    file: Annotated[Path, typer.Option(metavar="FILE", help=f"The {SIDE} that should have produced it.")],
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
    max_faults: Annotated[int, typer.Option(min=1, max=64, help="Faults to look for, one after the other.")] = 8,
    force_file: Annotated[
        bool, typer.Option("--force-file", help="Go on although the trace is of another SHA-256 than FILE.")
    ] = False,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Find the faults that turn what a file gives into what a trace holds: config, computation or weights.

    Exit code 1 says that there is a drift; the report says whether it is explained.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.counted import counted_progress
    from aprjax.bisect.explain.command import explain_side, write_report
    from aprjax.bisect.explain.render import render
    from aprjax.trace.sides import NoTokens

    check_destinations(json_out, report)
    with counted_progress() as bar:
        try:
            found = explain_side(
                side,
                file,
                arithmetic=arithmetic,
                max_faults=max_faults,
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
        print(f"report: {write_report(found, report)}", file=sys.stderr)
    return found.verdict.exit_code
