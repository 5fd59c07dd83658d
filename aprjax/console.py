"""Results to stdout and to JSON files, progress to stderr: what the commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from aprjax.checkpoint.fetch import Report

# Two long paths fit on a line; no renderer fills the width, so that it costs nothing.
PIPED_COLUMNS = 1000


def show(render: Callable[[Console], None], value: dict[str, Any], json_out: str | None) -> None:
    """Prints for people, unless JSON takes stdout; writes JSON where it was asked for."""
    # NaN has no place in JSON: who means "not measured" says null. ASCII survives any stdout encoding.
    text = json.dumps(value, indent=2, allow_nan=False) + "\n" if json_out is not None else ""
    if json_out == "-":
        sys.stdout.write(text)
        return
    if json_out is not None:
        from aprjax.checkpoint.atomic import atomic_file

        with atomic_file(json_out) as stream:
            stream.write(text.encode("ascii"))
    from rich.console import Console

    # Wide enough for a tensor's line where no terminal says how wide it is: cut lines are no use to `grep`.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    render(Console(width=PIPED_COLUMNS if piped else None, highlight=False))


@contextmanager
def progress() -> Iterator[Report]:
    """A progress bar of bytes on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            # A total of 1 stands for a step that is not counted in bytes: the numbers stay as they are.
            if total > 1:
                bar.update(task, description=what, completed=done, total=total)
            else:
                bar.update(task, description=what)

        yield report
