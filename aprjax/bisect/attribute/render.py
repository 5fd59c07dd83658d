"""The report of `attribute` for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.attribute.report import AttributeReport, CauseShare
from aprjax.bisect.locate.report import place
from aprjax.bisect.report import Verdict

if TYPE_CHECKING:
    from rich.console import Console


# Causes shown; the JSON has all of them.
_MOST_CAUSES = 6


def render(report: AttributeReport, console: Console, *, top: int = 12) -> None:
    """Sides, the number, its largest shares with the runs that check them, and how far they add up; in 80 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for name, side in report.sides.items():
        console.print(f"{name:5}  {escape(Path(side.path).name)} [dim]{escape(side.format)}, {side.arithmetic}[/]")
    tokens = f"{len(report.prompt.tokens)} tokens, positions {', '.join(map(str, report.prompt.positions[:8]))}"
    console.print(f"[dim]{tokens}; base network in {report.dtype}[/]")
    if report.metric == "margin":
        pair = f"of token {report.chosen[-1]} over token {report.rival[-1]}"
    else:
        pair = "from the reference, in nats"
    console.print(
        f"{report.metric} {pair}: {report.ref_value:.5g} in the reference, {report.model_value:.5g} in the model"
    )
    if report.contributions:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("stage", no_wrap=True)
        for heading in ("share", "first order", "infects", "heals"):
            table.add_column(heading, justify="right")
        table.add_column("most of it", no_wrap=True)
        for found in report.top(top):
            checks = ["" if value is None else f"{value:+.3g}" for value in (found.infects, found.heals)]
            most = found.parts[0][0] if len(found.parts) > 1 else ""
            where = f"{most} at {found.positions[0][0]}".strip() if found.positions else most
            shares = (f"{found.integrated:+.3g}", f"{found.first_order:+.3g}")
            table.add_row(place(found.layer, found.stage), *shares, *checks, where)
        rest = report.contributions[top:]
        if rest:
            table.add_row(f"{len(rest)} more", f"{sum(c.integrated for c in rest):+.3g}", "", "", "", "")
        console.print(table)
    _causes(report, console)
    passes = report.passes
    console.print(f"[dim]{passes['forwards']} forward and {passes['backwards']} backward passes[/]")
    colour = {Verdict.AGREE: "green", Verdict.DIVERGENCE: "red"}.get(report.verdict, "magenta")
    console.print(f"[bold {colour}]{'MEASURED' if report.verdict is Verdict.AGREE else 'UNMEASURED'}[/]")
    console.print(f"  {escape(report.reason)}")


def _causes(report: AttributeReport, console: Console) -> None:
    """The shares added up by what makes them; of the largest also the sentence, the next step and the confidence."""
    from rich.markup import escape

    largest = max((abs(cause.integrated) for cause in report.causes), default=0.0)
    for index, cause in enumerate(report.causes[:_MOST_CAUSES]):
        checks = (("put into the reference", cause.infects), ("taken out of the model", cause.heals))
        runs = [f"{words} {value:+.3g}" for words, value in checks if value is not None]
        console.print(f"[bold]{cause.integrated:+.4g}[/] {escape(cause.name)}", highlight=False)
        console.print(f"  [dim]{escape('; '.join([*runs, _places(cause)]))}[/]", highlight=False)
        # A cause that makes a tenth of the largest has something to say for itself.
        if index == 0 or abs(cause.integrated) >= largest / 10:
            console.print(f"  {escape(cause.sentence)}", highlight=False)
            console.print(f"  next: {escape(cause.next_step)}", highlight=False)
            console.print(f"  [dim]{escape(cause.confidence.sentence())}[/]", highlight=False)
    rest = report.causes[_MOST_CAUSES:]
    if rest:
        console.print(f"[dim]{sum(c.integrated for c in rest):+.4g} from {len(rest)} more (all are in the JSON)[/]")


def _places(cause: CauseShare) -> str:
    listed = ", ".join(f"{where} {share:+.3g}" for where, share in cause.places)
    return f"most of it at {listed}" if len(cause.places) > 1 else f"at {listed}"
