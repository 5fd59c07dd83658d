"""The commands that judge one side by its own file: `replay` and `noise`. Registered by `aprjax.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli import ARITHMETIC, ENGINE, SIDE, Wrap, command, token_ids, valid_arithmetic
from aprjax.console import progress, show

Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to run it on.")]
Tokens = Annotated[str | None, typer.Option(metavar="IDS", help="The same, as token ids: 3838,374,220.")]
JsonOut = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON; - is stdout.")]


def _preset_or_auto(name: str | None) -> str | None:
    return name if name == "auto" else valid_arithmetic(name)


def _check(prompt: str | None, tokens: str | None, wrap: Wrap) -> None:
    if prompt is not None and tokens is not None:
        raise typer.BadParameter("give at most one of --prompt, --tokens")
    if tokens is not None and wrap is not Wrap.NONE:
        raise typer.BadParameter("--wrap goes with text: token ids are taken as they are")


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
    tokens: Tokens = None,
    wrap: Annotated[Wrap, typer.Option(help="Wrap the prompt in a ChatML user turn.")] = Wrap.NONE,
    force_file: Annotated[
        bool, typer.Option("--force-file", help="Judge by FILE although the trace is of another SHA-256.")
    ] = False,
    json_out: JsonOut = None,
) -> int:
    """Find the nodes of one trace that its file does not explain, given each node's own inputs."""
    _check(prompt, tokens, wrap)
    from aprjax.bisect.replay_command import render, replay_side
    from aprjax.trace.sides import NoTokens

    with progress() as bar:
        try:
            report = replay_side(
                side,
                file,
                arithmetic=arithmetic,
                force_file=force_file,
                prompt=prompt,
                tokens=token_ids(tokens),
                times=wrap.value,
                progress=lambda what, done, total: bar(f"{what}, {done} of {total}", done, 1),
            )
        except NoTokens as error:
            raise typer.BadParameter(str(error)) from None
    show(lambda console: render(report, console), report.to_json(), json_out)
    return report.verdict.exit_code


@command
def noise(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"A {SIDE}.")],
    *,
    arithmetic: Annotated[
        str, typer.Option(metavar="NAME", callback=valid_arithmetic, help=ARITHMETIC.format("it"))
    ] = "llama.cpp",
    prompt: Prompt = None,
    tokens: Tokens = None,
    wrap: Annotated[Wrap, typer.Option(help="Wrap the prompt in a ChatML user turn.")] = Wrap.NONE,
    engine: Annotated[bool, typer.Option(help="Also run llama.cpp's own variants, if the file is GGUF.")] = True,
    json_out: JsonOut = None,
) -> int:
    """Measure how far a file differs from itself when only the order or precision of its sums changes."""
    _check(prompt, tokens, wrap)
    from aprjax.bisect.noise_report import noise_of, render

    with progress() as bar:
        report = noise_of(
            file,
            prompt=prompt,
            tokens=token_ids(tokens),
            times=wrap.value,
            arithmetic=arithmetic,
            engine=engine,
            progress=lambda what, done, total: bar(f"{what}, {done} of {total}", done, 1),
        )
    show(lambda console: render(report, console), report.to_json(), json_out)
    return 0
