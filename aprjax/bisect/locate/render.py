"""The report of `locate` for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.locate.report import LocatedFault, LocateReport, place
from aprjax.bisect.report import Verdict

if TYPE_CHECKING:
    from rich.console import Console


def render(report: LocateReport, console: Console, *, every_run: bool = False) -> None:
    """Sides, the causes with their proof, what was run, and the verdict, in 80 columns."""
    from rich.markup import escape

    for name, side in report.sides.items():
        console.print(f"{name:5}  {escape(Path(side.path).name)} [dim]{escape(side.format)}, {side.arithmetic}[/]")
    console.print(f"[dim]{len(report.prompt.tokens)} tokens, logits at {len(report.prompt.positions)} positions[/]")
    if every_run:
        _runs(report, console)
    for fault in report.faults:
        console.print(f"[red]{escape(place(fault.layer, fault.stage))}[/]: {escape(fault.cause)}")
        for line in _proof(fault):
            console.print(f"  {escape(line)}", highlight=False)
        if fault.next_step:
            console.print(f"  next: {escape(fault.next_step)}")
        console.print(f"  [dim]{escape(fault.confidence.sentence())}[/]")
    for finding in report.findings:
        if finding.id == "not-located":
            console.print(f"[yellow]{escape(finding.message)}[/]", highlight=False)
    for effect in report.choices:
        console.print(f"[bold]{escape(effect.name)}[/]: {escape(effect.sentence())}", highlight=False)
    spent = ", ".join(f"{name} {s['runs']:.0f} runs = {s['passes']:.1f} passes" for name, s in report.passes.items())
    console.print(f"[dim]forward passes: {spent}[/]")
    colour = {Verdict.AGREE: "green", Verdict.DIVERGENCE: "red"}.get(report.verdict, "magenta")
    console.print(f"[bold {colour}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def _proof(fault: LocatedFault) -> list[str]:
    at = "" if fault.measured == "logits" else f" ({fault.measured})"
    lines = [f"put right, the drift falls from {fault.before:.3g} to {fault.after:.3g}{at}"]
    if fault.infects is not None:
        lines.append(f"put into the reference, it makes its logits drift by {fault.infects:.3g}")
    if fault.parts is not None:
        parts = fault.parts
        names = ", ".join(parts.names[:6]) + (" …" if len(parts.names) > 6 else "")
        where = f"positions {', '.join(map(str, parts.positions[:6]))}" + (" …" if len(parts.positions) > 6 else "")
        healed = "" if parts.healed is None else f": put right alone, {parts.healed:.1%} of the drift goes"
        lines.append(f"{parts.kind} {names} ({len(parts.names)} of {parts.of}), {where}{healed}")
    return lines


def _runs(report: LocateReport, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("run", "drift", "layers"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for run in report.runs:
        style = "green" if run.healed else None
        table.add_row(escape(run.question), f"{run.drift:.3g}", str(run.layers), style=style)
    console.print(table)
