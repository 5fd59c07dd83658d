"""The waterfall of an `attribute` report: from the reference's number to the model's, one bar per share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprjax.bisect.attribute.report import AttributeReport
from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.locate.report import place

# Shares with a bar of their own: the largest.
_SHARES = 16


def write_waterfall(report: AttributeReport, path: Path) -> None:
    """Writes the waterfall as a PNG file."""
    from aprjax.checkpoint.atomic import atomic_file

    with atomic_file(path) as stream:
        save_figure(plot_waterfall(report), stream)


def plot_waterfall(report: AttributeReport, *, top: int = _SHARES) -> Any:
    """A matplotlib figure: from the reference's number to the model's, one bar per share, largest first."""
    shown, rest = report.contributions[:top], report.contributions[top:]
    names = [place(c.layer, c.stage) for c in shown] + ([f"{len(rest)} more"] if rest else [])
    sizes = [c.integrated for c in shown] + ([sum(c.integrated for c in rest)] if rest else [])
    figure = new_figure(8, 0.9 + 0.28 * (len(names) + 2))
    axes = figure.subplots()
    level = report.ref_value
    for row, size in enumerate(sizes, start=1):
        axes.barh(row, size, left=level, color="#b2182b" if size < 0 else "#2166ac", height=0.7)
        level += size
    for row, value in ((0, report.ref_value), (len(names) + 1, report.model_value)):
        axes.plot([value, value], [row - 0.4, row + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(names) + 2), ["reference", *names, "model"])
    axes.invert_yaxis()
    axes.set_xlabel(f"{report.metric} ({'nats' if report.metric == 'kl' else 'logits'})")
    axes.set_title(f"{report.metric}: {report.change:+.4g}, shares miss {report.gap:.2%} of it", fontsize=10)
    # Bars would else touch the frame and look cut off.
    axes.use_sticky_edges = False
    axes.margins(x=0.04)
    axes.grid(axis="x", alpha=0.3)
    return figure
