"""The plot of an `explain` report: what each hypothesis leaves, against what rounding explains."""

from __future__ import annotations

from typing import Any

from aprjax.bisect.explain.report import ExplainReport
from aprjax.bisect.figure import new_figure

# Hypotheses drawn of each fault: the accepted one and the nearest others.
_MOST_TRIED = 8
_BEFORE, _ACCEPTED, _REFUSED = "#6e7781", "#1a7f37", "#b2182b"


def plot_residuals(report: ExplainReport) -> Any:
    """A matplotlib figure: by fault, the distance without a hypothesis, with the accepted one, and with the others.

    The dashed line is the tolerance: what a hypothesis leaves to the left of it is rounding.
    """
    groups = [
        (
            found.sentence,
            found.tolerance,
            [("as the file gives it", found.before, _BEFORE), (found.id, found.residual, _ACCEPTED)]
            + [(tried.id, tried.residual, _REFUSED) for tried in found.rivals],
        )
        for found in report.explanations
    ] + [
        (
            left.reason,
            left.tolerance,
            [("as the file gives it", left.before, _BEFORE)]
            + [(tried.id, tried.residual, _REFUSED) for tried in left.excluded],
        )
        for left in report.unexplained
        if left.like is None
    ]
    heights = [min(len(rows), _MOST_TRIED) for _, _, rows in groups] or [1]
    figure = new_figure(9, 0.6 + sum(0.8 + 0.28 * height for height in heights))
    found = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    if not groups:
        found[0].set_axis_off()
        figure.suptitle(f"{report.verdict}: {report.reason}", fontsize=10)
        return figure
    values = [v for _, tolerance, rows in groups for v in (tolerance, *(row[1] for row in rows)) if v]
    foot = min(values, default=1e-9) / 10
    for axes, (title, tolerance, rows) in zip(found, groups, strict=True):
        shown = rows[:_MOST_TRIED]
        for row, (_, value, colour) in enumerate(shown):
            # What is not finite has no bar; what is zero ends at the foot.
            axes.barh(row, max(value or 0.0, foot) - foot / 2, left=foot / 2, color=colour, height=0.7)
        axes.set_xscale("log")
        if tolerance:
            axes.axvline(tolerance, color="black", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title if len(title) <= 110 else title[:109] + "…", fontsize=9, loc="left")
    found[-1].set_xlabel("relative L2 of the worst position (dashed: what rounding explains)")
    return figure
