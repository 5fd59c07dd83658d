"""The command `files`: two files compared without running either."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import SIDE, JsonOut, ReportDir
from aprjax.console import show


@command
def files(
    *,
    model: Annotated[str, typer.Option(metavar="FILE", help=f"The file to judge: a {SIDE}.")],
    ref: Annotated[str, typer.Option(metavar="FILE", help=f"The file to judge it by: a {SIDE}.")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every tensor, even where the bytes are equal.")
    ] = False,
    top: Annotated[int, typer.Option(min=0, metavar="K", help="How many differing tensors to list.")] = 10,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Compare config, tensors, bytes and values of two files, and explain what differs.

    Nothing is run: each differing tensor is searched for what turns the one into the other.
    """
    from aprjax.bisect.files.command import compare_two_files
    from aprjax.bisect.files.render import render

    found = compare_two_files(model, ref, decode=decode, json_out=json_out, report=report)
    show(lambda console: render(found, console, top=top), found.to_json(), json_out)
    if report is not None:
        print(f"report: {report / 'index.html'}", file=sys.stderr)
    return found.verdict.exit_code
