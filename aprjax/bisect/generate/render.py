"""The `generate` report for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.generate.report import Continuation, FirstDifference, GenerateReport, Kind, View
from aprjax.bisect.report import Verdict
from aprjax.trace.generation import Passes, Stop

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    Verdict.AGREE: "bold green",
    Verdict.NEAR_TIE: "bold yellow",
    Verdict.DIVERGENCE: "bold red",
    Verdict.UNMEASURED: "bold magenta",
}
# Wider columns are no easier to compare.
_COLUMN = 60
# Findings shown; the JSON has all of them.
_MOST_FINDINGS = 8


def print_reports(reports: list[GenerateReport], console: Console) -> None:
    """What ran, and of each prompt both texts, where they part, and the verdict."""
    from rich.markup import escape

    for name, side in reports[0].sides.items():
        console.print(f"{name:6} {escape(Path(side.path).name)}", soft_wrap=True)
        console.print(f"       [dim]{side.format}, {side.arithmetic} arithmetic, sha256 {side.sha256[:16]}…[/]")
    if reports[0].shared:
        console.print(f"[dim]{reports[0].shared}[/]")
    _print_findings(reports, console)
    for report in reports:
        _print(report, console)


def _print_findings(reports: list[GenerateReport], console: Console) -> None:
    from rich.markup import escape

    order = {"error": 0, "warning": 1, "info": 2}
    found = dict.fromkeys(finding for report in reports for finding in report.findings)
    rest = sorted((f for f in found if f.id != "files-compared"), key=lambda f: order[f.severity])
    for finding in (f for f in found if f.id == "files-compared"):
        console.print(f"files  {escape(finding.message)}")
    for finding in rest[:_MOST_FINDINGS]:
        side = f"{finding.side}: " if finding.side not in ("", "both") else ""
        tensor = f"{finding.tensor}: " if finding.tensor and finding.tensor not in finding.message else ""
        console.print(f"{finding.severity:7} {escape(f'{side}{tensor}{finding.message}')} [dim]({finding.id})[/]")
    if len(rest) > _MOST_FINDINGS:
        console.print(f"[dim]… and {len(rest) - _MOST_FINDINGS} more findings (all are in the JSON)[/]")


def _print(report: GenerateReport, console: Console) -> None:
    from rich.markup import escape

    wrapped = "" if report.prompt.wrap == "none" else f", wrapped {report.prompt.wrap} in ChatML"
    ignored = ", stop tokens ignored" if report.ignore_stop else ""
    console.print(f"{report.prompt.name}: {len(report.prompt.tokens)} tokens{wrapped}{ignored}")
    _print_texts(report, console)
    for name, side in report.continuations.items():
        console.print(f"[dim]{name:6} {len(side.tokens)} tokens, {_ending(side)}; {work(side.passes)}[/]")
    if report.smallest_margin is not None:
        console.print(f"[dim]smallest margin before: {report.smallest_margin:.3g} logits{_close(report)}[/]")
    first = report.first_difference
    if first is not None and first.kind is Kind.TOKEN:
        _print_views(first, report, console)
    place = "" if first is None else f" at new token {first.step + 1}"
    console.print(f"[{_STYLES[report.verdict]}]{str(report.verdict).upper()}{place}[/]")
    console.print(f"  {escape(report.reason)}")
    if report.next_step:
        console.print(f"  next: {escape(report.next_step)}")


def _print_texts(report: GenerateReport, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if report.common_text is None:
        return
    if report.common_text:
        console.print(Text(visible(report.common_text)))
    sides = report.continuations
    if not any(side.rest for side in sides.values()):
        return
    width = min(_COLUMN, max(20, (console.width - 4) // 2))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("ref", "model"):
        table.add_column(f"{name} goes on", width=width, overflow="fold")
    table.add_row(*(Text(visible(sides[name].rest or "")) for name in ("ref", "model")))
    console.print(table)


def _print_views(first: FirstDifference, report: GenerateReport, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    pieces = first.pieces or ("", "")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("side", "chooses"):
        table.add_column(heading)
    for heading in ("margin", "other's rank", "gap", "sigma"):
        table.add_column(heading, justify="right")
    for name, view, piece in (("ref", first.ref, pieces[1]), ("model", first.model, pieces[0])):
        chosen = "" if view.margin is None else f"{view.margin.top1} “{piece}”"
        table.add_row(name, escape(chosen), *_numbers(view, report))
    console.print(table)


def _numbers(view: View, report: GenerateReport) -> list[str]:
    sigma = None if report.noise is None else report.noise["sigma"]
    if view.margin is None or view.gap is None:
        return ["–"] * 4
    relative = f"{view.gap / sigma:.3g}" if sigma else "–"
    return [f"{view.margin.margin:.4g}", str(view.rank), f"{view.gap:.4g}", relative]


def _ending(side: Continuation) -> str:
    return "ended by a stop token" if side.stop is Stop.TOKEN else "as many as were asked for"


def work(passes: Passes) -> str:
    """What a side computed, in words."""
    if not passes.batched and not passes.steps:
        return "nothing was computed"
    parts = []
    if passes.batched:
        parts.append(f"{passes.batched} batched pass{'es' if passes.batched > 1 else ''}")
    if passes.steps:
        parts.append(f"{passes.steps} step{'s' if passes.steps > 1 else ''}")
    return f"{' and '.join(parts)} in {passes.seconds:.1f} s"


def _close(report: GenerateReport) -> str:
    if not report.close_steps:
        return ""
    return f", {len(report.close_steps)} of {len(report.steps)} within the noise"


def visible(text: str) -> str:
    """The text without characters that would move a terminal's cursor or colours; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
