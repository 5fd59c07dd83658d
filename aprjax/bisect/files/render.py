"""The `files` report for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprjax.bisect.files.report import Cause, FileInfo, FilesComparison
from aprjax.bisect.report import Verdict

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {Verdict.AGREE: "bold green", Verdict.DIVERGENCE: "bold red", Verdict.UNMEASURED: "bold magenta"}
_COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}
_LISTED_TENSORS = 3
_MOST_FINDINGS = 12


def render(report: FilesComparison, console: Console, *, top: int = 10) -> None:
    """The two inventories, differing keys, the tensors that differ most, what explains them, the verdict."""
    from rich.markup import escape

    for name, side in report.sides.items():
        console.print(f"{name:6} {escape(_side_line(side))}")
    for key, (ours, theirs) in report.files.config.items():
        colour = "red" if key in report.files.active_config else "dim"
        console.print(f"[{colour}]config[/] {key}: model {ours!r}, ref {theirs!r}")
    _print_tensors(report, console, top)
    for cause in report.causes:
        _print_cause(cause, console)
    _print_findings(report, console)
    console.print(f"[{_STYLES.get(report.verdict, 'bold')}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def _side_line(side: FileInfo) -> str:
    types = ", ".join(f"{count} {name}" for name, (count, _) in side.block_types.items())
    return f"{Path(side.path).name}: {side.tensors} tensors, {side.values:,} values ({types})"


def _print_tensors(report: FilesComparison, console: Console, top: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = report.top(top)
    if not shown:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("types", "rel L2", "cosine", "rows", "explained by", "left"):
        table.add_column(heading, no_wrap=heading != "explained by", justify="right" if heading == "left" else "left")
    for row in shown:
        types = row["ref_type"] if row["model_type"] == row["ref_type"] else f"{row['model_type']}/{row['ref_type']}"
        cells = (
            row["tensor"].removeprefix("model.").removesuffix(".weight"),
            types,
            _number(row["rel_l2"]),
            _number(row["cosine"], 6),
        )
        rows = _rows(row)
        left = "exact" if row["residual"] == 0 else _number(row["residual"])
        table.add_row(*(escape(str(cell)) for cell in (*cells, rows, row["explanation"] or "nothing", left)))
    console.print(table)
    more = len(report.files.differing) - len(shown)
    if more > 0:
        console.print(f"[dim]… and {more} more tensors that differ (all are in the JSON)[/]")


def _rows(row: dict[str, Any]) -> str:
    return "" if not row["rows"] else (f"{row['first_row']}" if row["rows"] == 1 else str(row["rows"]))


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _print_cause(cause: Cause, console: Console) -> None:
    from rich.markup import escape

    listed = ", ".join(cause.tensors[:_LISTED_TENSORS]) + (" …" if len(cause.tensors) > _LISTED_TENSORS else "")
    count = f"{len(cause.tensors)} tensor{'s' if len(cause.tensors) > 1 else ''}"
    console.print(f"[bold]{cause.id or 'unexplained'}[/] {count}: {escape(listed)}")
    console.print(f"  {escape(cause.sentence)}")
    if cause.next_step:
        console.print(f"  next: {escape(cause.next_step)}")
    console.print(f"  [dim]{escape(cause.confidence.sentence())}[/]")


def _print_findings(report: FilesComparison, console: Console) -> None:
    from rich.markup import escape

    # The tensors and keys stand above.
    told = ("tensor-differs", "config-differs")
    found = [finding for finding in report.findings if finding.id not in told]
    for finding in found[:_MOST_FINDINGS]:
        side = f"{finding.side}: " if finding.side not in ("", "both") else ""
        colour = _COLOURS[finding.severity]
        text = escape(side + finding.message)
        console.print(f"[{colour}]{finding.severity:7}[/] {text} [dim]({escape(finding.id)})[/]")
    if len(found) > _MOST_FINDINGS:
        console.print(f"[dim]… and {len(found) - _MOST_FINDINGS} more findings (all are in the JSON)[/]")
