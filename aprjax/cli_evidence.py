"""The command `evidence`: folders examined, sealed, and used to move a contract's status."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import JsonOut
from aprjax.console import show

CONTRADICTED = 1


@command
def evidence(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Evidence folders.")],
    *,
    seal: Annotated[
        bool, typer.Option("--seal", help="Write each folder's MANIFEST.json anew, if nothing else in it is wrong.")
    ] = False,
    discharge: Annotated[
        Path | None, typer.Option(metavar="CONTRACT", help="Move the statuses in this contract's file by the evidence.")
    ] = None,
    json_out: JsonOut = None,
) -> int:
    """Examine evidence: nothing missing, added or altered, and no file contradicts another.

    Exit code 1 where something is wrong, or --discharge is refused; the reason is said.
    """
    if discharge is not None and (seal or len(folders) != 1):
        raise typer.BadParameter("--discharge takes one folder, and no --seal")
    from aprjax.contracts.evidence import discharge as discharging
    from aprjax.contracts.evidence.command import examine, sealed
    from aprjax.contracts.evidence.render import render, render_discharge

    reports = sealed(folders) if seal else examine(folders)
    if discharge is None:
        document = {"schema": "aprjax.evidence-list/1", "folders": [report.to_json() for report in reports]}
        show(lambda console: render(reports, console), document, json_out)
        return max((report.exit_code for report in reports), default=0)
    try:
        found = discharging.discharge(reports[0], discharge)
    except discharging.Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return CONTRADICTED
    show(lambda console: render_discharge(found, console), found.to_json(), json_out)
    return 0
