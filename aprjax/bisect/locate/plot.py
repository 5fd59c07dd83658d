"""The plot of a `locate` report: every run's drift, in the order in which the runs were made."""

from __future__ import annotations

from typing import Any

from aprjax.bisect.figure import new_figure
from aprjax.bisect.locate.report import LocateReport

# Runs drawn, the last ones of more: they confirm what the search came to.
_MOST_RUNS = 24
_GUILTY, _HEALED = "#b2182b", "#2166ac"


def plot_runs(report: LocateReport) -> Any:
    """A matplotlib figure: a bar per run, red where the drift stays, blue where the values put in take it away.

    Drifts measured at a boundary between two layers are hatched: they are relative, and not the logits'.
    """
    runs = [run for run in report.runs if run.drift < float("inf")][-_MOST_RUNS:]
    figure = new_figure(10, 1.2 + 0.26 * max(len(runs), 1))
    axes = figure.subplots()
    # Zero has no place on a logarithmic axis: such bars end at its foot.
    positive = [drift for drift in (report.drift, report.floor, *(run.drift for run in runs)) if drift > 0]
    foot = min(positive, default=1e-9) / 10
    for row, run in enumerate(runs):
        axes.barh(
            row,
            max(run.drift, foot) - foot / 2,
            left=foot / 2,
            color=_HEALED if run.healed else _GUILTY,
            hatch="" if run.measured == "logits" else "///",
            edgecolor="white",
            height=0.75,
        )
        if run.drift == 0:
            axes.text(foot, row, " 0", color="white", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(report.drift, color="black", linewidth=1, label="drift as it is")
    if report.floor > 0:
        axes.axvline(report.floor, color="#9a6700", linestyle=":", label="what noise explains")
    axes.set_yticks(range(len(runs)), [f"{run.side}: {run.question}" for run in runs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("drift of the logits (hatched: relative L2 at a layer's input)")
    axes.set_title(f"{report.verdict}: {len(report.runs)} runs with values put in", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower left", frameon=False)
    return figure
