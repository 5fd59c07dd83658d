"""The plot of a `noise` report: what every change moves, by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.noise.report import NoiseReport
from aprjax.qwen2.stages import Stage


def save_plot(report: NoiseReport, target: BinaryIO) -> None:
    """Writes the plot as PNG."""
    save_figure(plot_report(report), target)


def plot_report(report: NoiseReport) -> Any:
    """A matplotlib figure: by stage, in execution order, the largest distance over the layers."""
    stages = list(Stage)
    figure = new_figure(10, 6)
    axes = figure.subplots()
    for change in report.changes:
        # On a logarithmic axis zero has no place: such stages, bit-identical, leave a gap.
        places = [i for i, stage in enumerate(stages) if change.stages.get(stage, (0.0, 0.0))[1] > 0]
        axes.plot(places, [change.stages[stages[i]][1] for i in places], "o-", markersize=3, label=change.name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(stages)), [str(stage) for stage in stages], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("largest relative L2 over the layers")
    axes.set_title(f"{Path(report.path).name}, {report.arithmetic}, {len(report.tokens)} tokens", fontsize=11)
    axes.legend(fontsize=8)
    return figure
