"""The command `report`: one page from saved reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command


@command
def report(
    reports: Annotated[
        list[Path], typer.Argument(metavar="JSON...", help="Reports that --json or --report wrote, or folders of them.")
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write index.html here.")],
) -> int:
    """Make one page of saved reports, of one or several commands: a single HTML file that needs no network.

    Exits with 0 when the page is made, whatever the verdicts on it: each command gave its own when it ran.
    """
    from aprjax.bisect.page import write_combined

    print(f"report: {write_combined(reports, out)}", file=sys.stderr)
    return 0
