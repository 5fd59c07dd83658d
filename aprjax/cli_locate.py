"""The commands that prove a cause by putting values in: `locate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_mesh import over_devices
from aprjax.cli_options import (
    BothArithmetic,
    JsonOut,
    Model,
    ModelArithmetic,
    Positions,
    Prompt,
    PromptFile,
    Ref,
    RefArithmetic,
    ReportDir,
    TokenIds,
    Wrap,
    WrapOption,
    check_arithmetic,
    check_prompt,
    token_ids,
)
from aprjax.console import show


@command
@over_devices
def locate(
    *,
    model: Model,
    ref: Ref,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    arithmetic: BothArithmetic = None,
    model_arithmetic: ModelArithmetic = None,
    ref_arithmetic: RefArithmetic = None,
    positions: Positions = "last",
    runs: Annotated[bool, typer.Option("--runs", help="Show every run that was made.")] = False,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Find the places that cause a drift, by putting the reference's values into the model and the reverse."""
    check_prompt(prompt, prompt_file, tokens, wrap)
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.asked_pair import Question
    from aprjax.bisect.locate.command import locate_sides
    from aprjax.bisect.locate.render import render

    check_destinations(json_out, report)
    question = Question(
        prompt=prompt,
        prompt_file=prompt_file,
        tokens=token_ids(tokens),
        wrap=wrap.value,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
    )
    found = locate_sides(model, ref, question)
    document = found.to_json()
    show(lambda console: render(found, console, every_run=runs), document, json_out)
    if report is not None:
        from aprjax.bisect.page import write_report

        print(f"report: {write_report(document, report)}", file=sys.stderr)
    return found.verdict.exit_code
