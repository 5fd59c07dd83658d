"""The program without its commands: the application, how commands register, and errors as exit codes.

Exit codes: 0 agree (or done) · 1 divergence · 2 usage · 3 unmeasured or inconclusive · 4 a file that cannot be
read or written. A fault of aprjax itself exits with 70, a reader that goes away (`… | head`) with
141, an interruption with 130: none of them can be taken for a verdict.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer

UNMEASURED = 3
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
        from aprjax.checkpoint.types import CheckpointError, UnmeasurableError

        if isinstance(error, CheckpointError | OSError):
            unmeasured = isinstance(error, UnmeasurableError)
            _complain(f"{'unmeasured' if unmeasured else 'error'}: {error}")
            raise SystemExit(UNMEASURED if unmeasured else UNREADABLE) from None
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
