"""The command `generate`."""

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

# As many as `benchmarks/generation_parity.py` asks for.
DEFAULT_NEW_TOKENS = 128


@command
@over_devices
def generate(
    *,
    model: Model,
    ref: Ref,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="How long a continuation may get.")
    ] = DEFAULT_NEW_TOKENS,
    ignore_stop: Annotated[bool, typer.Option("--ignore-stop", help="Go on after tokens that end an answer.")] = False,
    step_by_step: Annotated[
        bool, typer.Option("--step-by-step", help="Decode the model by itself, instead of verifying in one pass.")
    ] = False,
    arithmetic: BothArithmetic = None,
    model_arithmetic: ModelArithmetic = None,
    ref_arithmetic: RefArithmetic = None,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Compare what two sides say: greedy continuations, where they part, and whether noise explains it.

    The reference decodes; the model verifies its tokens in one pass, and decodes from the first difference on.
    Without a prompt three probes are run: a direct question, the same in ChatML, and a text of about 500 tokens.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    from aprjax.bisect.generate.command import combined_json, run_generate, worst
    from aprjax.bisect.generate.render import print_reports

    reports = run_generate(
        model=model,
        ref=ref,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        prompt_file=prompt_file,
        tokens=token_ids(tokens),
        wrap=wrap.value,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        ignore_stop=ignore_stop,
        step_by_step=step_by_step,
        json_out=json_out,
        report=report,
    )
    document = combined_json(reports)
    show(lambda console: print_reports(reports, console), document, json_out)
    if report is not None:
        from aprjax.bisect.generate.html import write_report

        print(f"report: {write_report(reports, document, report)}", file=sys.stderr)
    return worst(reports).verdict.exit_code
