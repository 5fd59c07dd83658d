"""The command that says which choices of two sides are safe, and which a small drift may flip: `margins`."""

from __future__ import annotations

import sys
from pathlib import Path
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
def margins(
    *,
    model: Model,
    ref: Ref,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    continuation: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text that both sides are fed after the prompt.")
    ] = None,
    continuation_tokens: Annotated[
        str | None, typer.Option("--continuation-tokens", metavar="IDS", help="The same, as token ids: 17,10,17.")
    ] = None,
    generate: Annotated[
        int, typer.Option(metavar="N", min=0, help="The same: up to N tokens that the reference chooses greedily.")
    ] = 0,
    text_file: Annotated[
        Path | None,
        typer.Option("--text-file", metavar="FILE", help="Instead of a prompt: a UTF-8 text, fed in contexts."),
    ] = None,
    context: Annotated[
        # Half of it is compared, and the last token has no successor: 4 leaves one position.
        int, typer.Option(metavar="N", min=4, help="Tokens of one context of --text-file.")
    ] = 512,
    arithmetic: BothArithmetic = None,
    model_arithmetic: ModelArithmetic = None,
    ref_arithmetic: RefArithmetic = None,
    positions: Positions = "all",
    noise: Annotated[
        bool, typer.Option("--noise/--no-noise", help="Measure the noise floor, by which flips are judged.")
    ] = True,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Compare both sides' next-token choices at every position: margins, flips, KL, and what noise explains.

    Both are fed the same tokens. Without a prompt three probes are run: a direct question, the same in ChatML, and
    a text of about 500 tokens.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    asked = sum((continuation is not None, continuation_tokens is not None, generate > 0))
    if asked > 1:
        raise typer.BadParameter("give at most one of --continuation, --continuation-tokens, --generate")
    prompted = any(given is not None for given in (prompt, prompt_file, tokens))
    if text_file is not None and (prompted or asked or wrap is not Wrap.NONE or positions != "all"):
        raise typer.BadParameter("--text-file goes without prompt, --wrap, continuation and --positions")
    if not prompted and (continuation is not None or continuation_tokens is not None):
        raise typer.BadParameter("a continuation goes with a prompt: --prompt, --prompt-file or --tokens")
    from aprjax.bisect.margins.command import Continuation, combined_json, run_margins, worst
    from aprjax.bisect.margins.render import render

    ids = token_ids(continuation_tokens)
    reports = run_margins(
        model=model,
        ref=ref,
        prompt=prompt,
        prompt_file=prompt_file,
        tokens=token_ids(tokens),
        wrap=wrap.value,
        continuation=Continuation(continuation, None if ids is None else tuple(ids), generate),
        text_file=text_file,
        context=context,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
        with_noise=noise,
        json_out=json_out,
        report=report,
    )
    document = combined_json(reports)
    show(lambda console: render(reports, console), document, json_out)
    if report is not None:
        from aprjax.bisect.margins.html import write_report

        print(f"report: {write_report(reports, document, report)}", file=sys.stderr)
    return worst(reports).verdict.exit_code
