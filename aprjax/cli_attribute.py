"""The command that shares a drift out over its causes: `attribute`."""

from __future__ import annotations

import sys
from enum import StrEnum
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


class Metric(StrEnum):
    """What is attributed."""

    MARGIN = "margin"
    KL = "kl"


class Base(StrEnum):
    """The float type of the network that gradients are taken of."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


@command
@over_devices
def attribute(
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
    metric: Annotated[Metric, typer.Option(help="What is attributed, averaged over the positions.")] = Metric.MARGIN,
    steps: Annotated[int, typer.Option(min=1, max=512, help="Gradients along the path from B to A.")] = 8,
    verify: Annotated[int, typer.Option(min=0, max=512, help="Shares to check by two real runs each.")] = 5,
    base: Annotated[Base, typer.Option(help="Float type of the network that gradients are taken of.")] = Base.FLOAT32,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Share out a margin's change over every stage's own error, by gradients checked by real runs.

    Exit code 0 when the shares add up to the change, 3 when they do not.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.asked_pair import Question
    from aprjax.bisect.attribute.command import attribute_sides, write_report
    from aprjax.bisect.attribute.render import render

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
    found = attribute_sides(model, ref, question, kind=metric.value, steps=steps, verify=verify, base=base.value)
    show(lambda console: render(found, console), found.to_json(), json_out)
    if report is not None:
        print(f"report: {write_report(found, report)}", file=sys.stderr)
    return found.verdict.exit_code
