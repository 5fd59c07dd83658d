"""The command line only: parse, call, print, exit.

Exit codes: 0 agree (or done) · 1 divergence · 2 usage · 3 unmeasured or inconclusive · 4 a file that cannot be
read or written. A fault of aprjax itself exits with 70, a reader that goes away (`… | head`) with
141, an interruption with 130: none of them can be taken for a verdict.

Results go to stdout; errors and progress go to stderr. jax, flax and matplotlib are imported by the
commands that need them.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from aprjax.console import progress, show
from aprjax.qwen2.arithmetic import PRESETS

UNREADABLE = 4
INTERNAL_ERROR = 70  # EX_SOFTWARE of BSD's sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
READER_GONE = 141  # 128 + SIGPIPE

EPILOG = (
    "Exit codes: 0 agree · 1 divergence · 2 usage · 3 unmeasured or inconclusive · "
    "4 a file that cannot be read or written."
)

app = typer.Typer(
    help="Where, and why, do two Qwen2 checkpoints or engines stop agreeing?",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Wrap(StrEnum):
    """How often a prompt is wrapped in a ChatML user turn."""

    NONE = "none"
    ONCE = "once"
    TWICE = "twice"


class _Options:
    """Options that stand before the command."""

    debug = False


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (by default the process's own) and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Frames and dots in a terminal that has no such characters must not become an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _errors_to_exit_codes():
            app(args=arguments)
    except SystemExit as stop:
        # A reader that goes away makes typer exit with 1, which here would mean a divergence.
        code = READER_GONE if isinstance(stop.__context__, BrokenPipeError) else stop.code
    else:
        code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = READER_GONE
    if code == READER_GONE:
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code if isinstance(code, int) else int(code is not None)


@contextmanager
def _errors_to_exit_codes() -> Iterator[None]:
    """The one place where errors become words and exit codes."""
    try:
        yield
    except typer.BadParameter:
        raise
    except BrokenPipeError:
        raise SystemExit(READER_GONE) from None
    except KeyboardInterrupt:
        _complain("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if _Options.debug:
            traceback.print_exc()
        from aprjax.checkpoint.types import CheckpointError

        if isinstance(error, CheckpointError | OSError):
            _complain(f"error: {error}")
            raise SystemExit(UNREADABLE) from None
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "please report it" if _Options.debug else "please report it with what `--debug` before the command shows"
        _complain(f"error: a fault in aprjax itself, not a verdict: {what} ({hint})")
        raise SystemExit(INTERNAL_ERROR) from None


def _complain(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Registers a command under its own name: what the function returns is the exit code."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        with _errors_to_exit_codes():
            code = function(*arguments, **options)
        raise typer.Exit(code)

    app.command(epilog=EPILOG)(run)
    return function


def _show_version(wanted: bool) -> None:
    if wanted:
        from aprjax import __version__

        print(f"aprjax {__version__}")
        raise typer.Exit


@app.callback()
def options_before_the_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Reads the options that stand before the command."""
    del version
    _Options.debug = debug


def _positions(text: str) -> str:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if text not in ("last", "all") and (bounds is None or int(bounds[1]) > int(bounds[2])):
        raise typer.BadParameter(f"expected last, all or A..B with A <= B (from 0, both counted), found {text!r}")
    return text


def token_ids(text: str | None) -> list[int] | None:
    """The ids of a list with commas."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise typer.BadParameter(f"expected token ids with commas between them (3838,374,220), found {text!r}")
    return [int(part) for part in text.split(",")]


def valid_arithmetic(name: str | None) -> str | None:
    """The name, if it is a preset's."""
    if name is not None:
        from aprjax.qwen2.arithmetic import UnknownArithmetic, preset

        try:
            preset(name)
        except UnknownArithmetic as error:
            raise typer.BadParameter(str(error)) from None
    return name


def _check_prompt(prompt: str | None, prompt_file: Path | None, tokens: str | None, wrap: Wrap) -> None:
    if sum(given is not None for given in (prompt, prompt_file, tokens)) > 1:
        raise typer.BadParameter("give at most one of --prompt, --prompt-file, --tokens")
    if tokens is not None and wrap is not Wrap.NONE:
        raise typer.BadParameter("--wrap goes with text: token ids are taken as they are")


SIDE = "checkpoint (.gguf, .apr, safetensors folder)"
ENGINE = "a saved trace, an APRT folder, llama.cpp:FILE.gguf or hf:DIR"
ARITHMETIC = f"How {{}} computes: {', '.join(PRESETS)}."


@command
def layers(
    *,
    model: Annotated[str, typer.Option(metavar="SIDE", help=f"The side to judge: a {SIDE}, {ENGINE}.")],
    ref: Annotated[str, typer.Option(metavar="SIDE", help=f"The side to judge it by: a {SIDE}, {ENGINE}.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to run both sides on.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a UTF-8 file.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help="The same, as token ids: 3838,374,220.")] = None,
    wrap: Annotated[Wrap, typer.Option(help="Wrap the prompt in a ChatML user turn.")] = Wrap.NONE,
    arithmetic: Annotated[
        str | None, typer.Option(metavar="NAME", callback=valid_arithmetic, help=ARITHMETIC.format("each side"))
    ] = None,
    model_arithmetic: Annotated[
        str | None, typer.Option(metavar="NAME", callback=valid_arithmetic, help=ARITHMETIC.format("the model's side"))
    ] = None,
    ref_arithmetic: Annotated[
        str | None,
        typer.Option(metavar="NAME", callback=valid_arithmetic, help=ARITHMETIC.format("the reference's side")),
    ] = None,
    positions: Annotated[
        str, typer.Option(metavar="last|all|A..B", callback=_positions, help="Token positions to compare.")
    ] = "all",
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON; - is stdout.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the report with its plots here.")] = None,
    save_trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Save what was captured.")] = None,
) -> int:
    """Find the first layer and stage at which two sides part, and why.

    Without a prompt three probes are run: a direct question, the same in ChatML, and a text of about 500 tokens.
    """
    _check_prompt(prompt, prompt_file, tokens, wrap)
    if arithmetic is not None and (model_arithmetic is not None or ref_arithmetic is not None):
        raise typer.BadParameter("give --arithmetic, or --model-arithmetic and --ref-arithmetic")
    from aprjax.bisect.command import run_layers

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
    )


@command
def trace(
    side: Annotated[str, typer.Argument(metavar="SIDE", help=f"A {SIDE}, {ENGINE}.")],
    *,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to run it on.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a UTF-8 file.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help="The same, as token ids: 3838,374,220.")] = None,
    wrap: Annotated[Wrap, typer.Option(help="Wrap the prompt in a ChatML user turn.")] = Wrap.NONE,
    arithmetic: Annotated[
        str | None, typer.Option(metavar="NAME", callback=valid_arithmetic, help=ARITHMETIC.format("a checkpoint"))
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The checkpoint that an APRT folder without sidecar came from.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors|DIR", help="Save it: a folder is written as APRT.")
    ] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the summary as JSON; - is stdout.")
    ] = None,
) -> int:
    """Capture what a checkpoint or an engine computes at every stage, and save it."""
    _check_prompt(prompt, prompt_file, tokens, wrap)
    from aprjax.trace.command import make_trace, render
    from aprjax.trace.sides import NoTokens

    asked = {"prompt": prompt, "prompt_file": prompt_file, "tokens": token_ids(tokens), "times": wrap.value}
    try:
        summary = make_trace(side, **asked, arithmetic=arithmetic, file=file, target=save)
    except NoTokens as error:
        raise typer.BadParameter(str(error)) from None
    show(lambda console: render(summary, console), summary, json_out)
    return 0


@command
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help=f"A {SIDE}.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf or .apr file, or a folder for safetensors.")],
    keep_blocks: Annotated[
        bool, typer.Option("--keep-blocks", help="Keep every block type that OUT can hold; widen only the others.")
    ] = False,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write what was done as JSON; - is stdout.")
    ] = None,
) -> int:
    """Convert between GGUF, APR v2 and safetensors, by default as `apr import` does."""
    from aprjax.checkpoint.convert import convert as convert_checkpoint
    from aprjax.checkpoint.render import render_conversion

    with progress() as report:
        done = convert_checkpoint(
            source, target, keep_blocks=keep_blocks, progress=lambda done, total: report("writing", done, total)
        )
    show(lambda console: render_conversion(done, console), done.to_json(), json_out)
    return 0


@command
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"A {SIDE}.")],
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write it as JSON; - is stdout."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Decode every tensor, and report values that no sound model has.")
    ] = False,
) -> int:
    """Show a checkpoint's config, tensors, block types, SHA-256 and findings."""
    from aprjax.checkpoint.inspect import inspect as inspect_checkpoint
    from aprjax.checkpoint.render import render_inspection

    inspection = inspect_checkpoint(file)
    # A GGUF file of another architecture is listed, but has no tensors whose use is known.
    if values and inspection.config is not None:
        from aprjax.checkpoint.open import open_checkpoint
        from aprjax.checkpoint.values import scan_values

        checkpoint = open_checkpoint(file)
        done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        with progress() as report:

            def advance(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                report("decoding", done, total)

            found = scan_values(checkpoint, progress=advance)
        # NaN is found without decoding, too.
        known = {(finding.id, finding.tensor) for finding in inspection.findings}
        found = [finding for finding in found if (finding.id, finding.tensor) not in known]
        inspection = replace(inspection, findings=(*inspection.findings, *found))
    show(lambda console: render_inspection(inspection, console), inspection.to_json(), json_out)
    return 0


@command
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="qwen2.5-coder-0.5b or qwen2.5-coder-1.5b.")],
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Where to; by default the cache.")] = None,
) -> int:
    """Fetch an official Qwen2.5-Coder-Instruct GGUF (q4_k_m), check its SHA-256 and print its path."""
    from aprjax.checkpoint.fetch import fetch as fetch_model
    from aprjax.checkpoint.fetch import known_models

    if model not in known_models():
        raise typer.BadParameter(f"the model {model!r} is unknown; known: {', '.join(known_models())}")
    with progress() as report:
        print(fetch_model(model, folder, report))
    return 0


# Last: it takes its names from here. `replay` and `noise` are registered by it.
from aprjax import cli_judging  # noqa: E402, F401
