"""What `evidence` shows on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from aprjax.contracts.evidence.discharge import Discharge
from aprjax.contracts.evidence.findings import EvidenceReport

if TYPE_CHECKING:
    from rich.console import Console


def render(reports: Sequence[EvidenceReport], console: Console) -> None:
    """A line per folder, and one per contradiction."""
    for report in reports:
        verdict = "[green]accepted[/green]" if report.accepted else f"[red]{len(report.contradictions)} wrong[/red]"
        counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
        counted = f": {counts}" if counts else ""
        console.print(f"{escape(str(report.folder))}  {verdict}  {report.files} files, {report.nbytes} bytes{counted}")
        for contradiction in report.contradictions:
            console.print(f"  {escape(str(contradiction))}")


def render_discharge(found: Discharge, console: Console) -> None:
    """A line per status that moved."""
    for move in found.moves:
        console.print(f"{escape(move.test_id or found.contract.stem)}: {move.before} → {move.after}")
    console.print(f"written: {escape(str(found.contract))}")
