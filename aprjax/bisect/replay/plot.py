"""The plot of a `replay` report: the distance of every node."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.replay.report import NodeReport, NodeVerdict, ReplayReport
from aprjax.qwen2.stages import OUTSIDE, Stage

# Colours begin at float32's unit roundoff: a smaller difference is none.
_FLOOR = 2.0**-24


def save_plot(report: ReplayReport, target: BinaryIO) -> None:
    """Writes the heat map as PNG."""
    save_figure(plot_report(report), target)


def plot_report(report: ReplayReport) -> Any:
    """A matplotlib figure, the heat map: grey is unmeasured, the darkest is exact, a frame is unexplained."""
    nodes = {(node.layer, node.stage): node for node in report.nodes if node.layer != OUTSIDE}
    stages = [stage for stage in Stage if any(known is stage for _, known in nodes)]
    layers = sorted({layer for layer, _ in nodes})
    values = np.array([[_distance(nodes.get((layer, stage))) for layer in layers] for stage in stages])
    figure = new_figure(9, 6.5)
    axes = figure.subplots()
    image = axes.imshow(
        np.log10(np.maximum(values.reshape(len(stages), len(layers)), _FLOOR)),
        aspect="auto",
        cmap="magma",
        vmin=float(np.log10(_FLOOR)),
        vmax=1.0,
        interpolation="nearest",
    )
    axes.set_facecolor("lightgrey")
    axes.set_yticks(range(len(stages)), [str(stage) for stage in stages], fontsize=8)
    axes.set_xlabel("layer")
    _mark_unexplained(axes, report, layers, stages)
    figure.colorbar(image, ax=axes).set_label("worst position's relative L2 from the file's value (log10)")
    outside = ", ".join(f"{n.stage}: {n.verdict}" for n in report.nodes if n.layer == OUTSIDE)
    axes.set_title(f"{report.verdict}: local distance of every node\n{outside}", fontsize=10)
    return figure


def _distance(node: NodeReport | None) -> float:
    if node is None or node.verdict is NodeVerdict.UNMEASURED:
        return np.nan
    # No distance is left of a value that is not finite: the brightest there is.
    return np.inf if node.worst_row is None else node.worst_row


def _mark_unexplained(axes: Any, report: ReplayReport, layers: list[int], stages: list[Stage]) -> None:
    from matplotlib.patches import Rectangle

    for node in report.unexplained:
        if node.layer != OUTSIDE:
            corner = (layers.index(node.layer) - 0.5, stages.index(node.stage) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="cyan", linewidth=2))
