"""The commands that run models: `layers`, the main job, and `trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_mesh import over_devices
from aprjax.cli_options import (
    ENGINE,
    SIDE,
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
    SaveTrace,
    TokenIds,
    Wrap,
    WrapOption,
    arithmetic_option,
    check_arithmetic,
    check_prompt,
    token_ids,
    valid_positions,
)
from aprjax.console import show

if TYPE_CHECKING:
    from rich.console import Console

    from aprjax.trace.capture import Capture

KEPT_LAYERS = "layers that are kept; -1 is embedding, final_norm and lm_head."


@command
@over_devices
def layers(
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
    positions: Positions = "all",
    json_out: JsonOut = None,
    report: ReportDir = None,
    save_trace: SaveTrace = None,
    save_layers: Annotated[str | None, typer.Option(metavar="N,A..B", help=f"Of --save-trace: {KEPT_LAYERS}")] = None,
    save_stages: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Of --save-trace: stages that are kept.")
    ] = None,
) -> int:
    """Find the first layer and stage at which two sides part, and why.

    Without a prompt three probes are run: a direct question, the same in ChatML, and a text of about 500 tokens.
    """
    check_prompt(prompt, prompt_file, tokens, wrap)
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    if save_trace is None and (save_layers, save_stages) != (None, None):
        raise typer.BadParameter("--save-layers and --save-stages go with --save-trace")
    capture = _capture(save_layers, save_stages)
    from aprjax.bisect.layers.command import run_layers

    return run_layers(
        model=model,
        ref=ref,
        prompt=prompt,
        prompt_file=prompt_file,
        tokens=token_ids(tokens),
        wrap=wrap.value,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
        json_out=json_out,
        report=report,
        save_trace=save_trace,
        capture=capture,
    )


def _capture(layers: str | None, stages: str | None, positions: str = "all") -> Capture:
    from aprjax.trace.capture import Capture

    try:
        return Capture.parse(layers=layers, stages=stages, positions=positions)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@command
@over_devices
def trace(
    side: Annotated[str, typer.Argument(metavar="SIDE", help=f"A {SIDE}, {ENGINE}.")],
    *,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: TokenIds = None,
    wrap: WrapOption = Wrap.NONE,
    arithmetic: Annotated[str | None, arithmetic_option("a checkpoint")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The checkpoint that an APRT folder without sidecar came from.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors|DIR", help="Save it: a folder is written as APRT.")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="N,A..B", help=KEPT_LAYERS.capitalize())] = None,
    stages: Annotated[str | None, typer.Option(metavar="NAME,…", help="Stages that are kept.")] = None,
    positions: Annotated[
        str, typer.Option(metavar="last|all|A..B", callback=valid_positions, help="Token positions that are kept.")
    ] = "all",
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the summary as JSON; - is stdout.")
    ] = None,
) -> int:
    """Capture what a checkpoint or an engine computes at every stage, and save it."""
    check_prompt(prompt, prompt_file, tokens, wrap)
    capture = _capture(layers, stages, positions)
    from aprjax.trace.command import make_trace, render
    from aprjax.trace.sides import NoTokens

    asked = {"prompt": prompt, "prompt_file": prompt_file, "tokens": token_ids(tokens), "times": wrap.value}
    try:
        summary = make_trace(side, **asked, arithmetic=arithmetic, file=file, target=save, capture=capture)
    except NoTokens as error:
        raise typer.BadParameter(str(error)) from None
    from aprjax.bisect.explain.identity_doubts import folder_doubts, print_identity

    identity = folder_doubts(side, file, token_ids(tokens))
    summary["identity"] = [finding.to_json() for finding in identity]

    def print_all(console: Console) -> None:
        render(summary, console)
        print_identity(identity, console)

    show(print_all, summary, json_out)
    return 0
