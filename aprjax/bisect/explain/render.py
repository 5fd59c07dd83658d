"""The report of `explain` for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.explain.report import ExplainReport, Explanation, Unexplained
from aprjax.bisect.replay.report import place
from aprjax.bisect.report import Verdict

if TYPE_CHECKING:
    from rich.console import Console

# Nodes without an explanation that are listed; the JSON has all of them.
_MOST_NODES = 6
# Hypotheses listed as excluded, and as rivals.
_MOST_TRIED = 4


def render(report: ExplainReport, console: Console) -> None:
    """What was explained, every fault with its next step, what stays unexplained, and the verdict."""
    from rich.markup import escape

    trace, file = report.trace, report.file
    console.print(f"trace  {escape(Path(trace['path']).name)}, {report.tokens} tokens, {escape(trace['arithmetic'])}")
    console.print(f"file   {escape(Path(file['path']).name)} [dim]sha256 {file['sha256'][:16]}…[/]")
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items() if count)
    if counts:
        console.print(f"[dim]replayed by {escape(report.arithmetic)}: {counts}[/]")
    for finding in report.identity:
        console.print(f"[yellow]{finding['severity']}[/] {escape(finding['sentence'])} [dim]({finding['id']})[/]")
        console.print(f"  next: {escape(finding['next_step'])}")
    for finding in report.findings:
        console.print(f"{finding.severity} {escape(finding.message)} [dim]({finding.id})[/]")
    for number, found in enumerate(report.explanations, 1):
        _explanation(number, found, console)
    for left in report.unexplained[:_MOST_NODES]:
        _unexplained(left, console)
    if len(report.unexplained) > _MOST_NODES:
        console.print(f"[dim]… and {len(report.unexplained) - _MOST_NODES} more (all are in the JSON)[/]")
    colour = {Verdict.AGREE: "green", Verdict.DIVERGENCE: "red"}.get(report.verdict, "magenta")
    console.print(f"[bold {colour}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def where(found: Explanation) -> str:
    """`q_post_rope, k_post_rope in every layer where it shows (24)`."""
    stages = ", ".join(dict.fromkeys(str(stage) for _, stage in found.nodes))
    layers = [layer for layer in found.layers if layer >= 0]
    if not layers:
        return stages
    if len(layers) == 1:
        return f"{stages} of layer {layers[0]}" + (", and no other could show it" if found.everywhere else "")
    span = f"{layers[0]} to {layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else _listed(layers)
    return f"{stages} of layers {span}" + (", wherever it could show" if found.everywhere else "")


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (" …" if len(layers) > 8 else "")


def _explanation(number: int, found: Explanation, console: Console) -> None:
    from rich.markup import escape

    kind = "" if found.complete else " [dim](in part)[/]"
    console.print(f"[bold]{number}. {escape(found.sentence)}[/]{kind}")
    console.print(
        f"   {found.before:.2g} -> {found.residual:.2g}, rounding {found.tolerance:.1g}; {escape(where(found))}"
    )
    console.print(f"   {escape(found.confidence.sentence())}")
    rivals = [rival for rival in found.rivals if rival.residual <= found.tolerance]
    if rivals:
        names = ", ".join(rival.sentence or rival.id for rival in rivals[:_MOST_TRIED])
        console.print(f"   [dim]explains it as well: {escape(names)}[/]")
    console.print(f"   next: {escape(found.next_step)}")


def _unexplained(left: Unexplained, console: Console) -> None:
    from rich.markup import escape

    console.print(f"[red]unexplained[/] {place(*left.node)}: {escape(left.reason)}")
    if left.like is not None:
        console.print(f"   [dim]like {place(*left.like)}, which was searched in its place[/]")
    elif left.excluded:
        tried = ", ".join(f"{one.id} {one.residual:.2g}" for one in left.excluded[:_MOST_TRIED])
        console.print(f"   [dim]{len(left.excluded)} hypotheses excluded, the nearest leave: {escape(tried)}[/]")
