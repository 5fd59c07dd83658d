"""The plots of a `layers` report: heat maps layers × stages, and the ratio curve with its band."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.report import LayersReport
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

# The band of upstream's apr-vs-gguf-forward-parity-v1 (contracts.md 1.3).
RATIO_BAND = (0.5, 2.0)
# Colours begin at float32's unit roundoff: a smaller difference is none.
_FLOOR = 2.0**-24


def plot_report(report: LayersReport) -> Any:
    """A matplotlib figure: local and free-running relative L2 by layer and stage, and std ratios by layer."""
    layers = [layer for layer in report.layers if layer.layer != OUTSIDE]
    figure = new_figure(13, 9.5)
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 2])
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    image = None
    for axes, key, title in (
        (left, "local_rel_l2", "local: from the reference's own inputs"),
        (right, "rel_l2", "free-running: local and inherited"),
    ):
        values = np.array([[_value(layer.stages.get(stage), key) for layer in layers] for stage in LAYER_STAGES])
        image = _heat_map(axes, values, title)
        _mark_first(axes, report)
    if image is not None:
        bar = figure.colorbar(image, ax=[left, right], shrink=0.85)
        bar.set_label("relative L2 (log10)")
    _ratio_curve(figure.add_subplot(grid[1, :]), report, layers)
    first = report.first_divergence
    place = "" if first is None else f" at {'' if first.layer == OUTSIDE else f'layer {first.layer}, '}{first.stage}"
    figure.suptitle(f"{report.prompt.name}: {report.verdict}{place}", fontsize=14)
    return figure


def save_plot(report: LayersReport, target: Path | BinaryIO) -> None:
    """Writes the figure as PNG."""
    save_figure(plot_report(report), target)


def _value(stage: Any, key: str) -> float:
    if stage is None:
        return np.nan
    value = stage.local_rel_l2 if key == "local_rel_l2" else stage.distance.rel_l2
    return np.nan if value is None else float(value)


def _heat_map(axes: Any, values: np.ndarray, title: str) -> Any:
    logs = np.log10(np.maximum(values, _FLOOR))
    image = axes.imshow(logs, aspect="auto", cmap="magma", vmin=np.log10(_FLOOR), vmax=1.0, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_yticks(range(len(LAYER_STAGES)), [str(stage) for stage in LAYER_STAGES], fontsize=8)
    axes.set_xlabel("layer")
    axes.set_facecolor("lightgrey")
    return image


def _mark_first(axes: Any, report: LayersReport) -> None:
    from matplotlib.patches import Rectangle

    first = report.first_divergence
    if first is None or first.layer == OUTSIDE:
        return
    corner = (first.layer - 0.5, LAYER_STAGES.index(first.stage) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="cyan", linewidth=2))


def _ratio_curve(axes: Any, report: LayersReport, layers: list[Any]) -> None:
    numbers = [layer.layer for layer in layers]
    for stage in LAYER_STAGES:
        ratios = [_ratio(layer.stages.get(stage)) for layer in layers]
        highlighted = stage is Stage.FFN_SWIGL
        axes.plot(
            numbers,
            ratios,
            color="tab:blue" if highlighted else "lightgrey",
            linewidth=2 if highlighted else 0.8,
            marker="o" if highlighted else None,
            markersize=3,
            zorder=3 if highlighted else 1,
            label=str(stage) if highlighted else ("other stages" if stage is LAYER_STAGES[0] else None),
        )
    axes.axhspan(*RATIO_BAND, color="tab:green", alpha=0.1, label=f"band {list(RATIO_BAND)}")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.4), max(high, 2.5))
    axes.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("std ratio, model / ref (ddof = 1)")
    axes.set_title(
        f"Ratio of standard deviations over {len(report.prompt.positions)} positions, the same on both sides",
        fontsize=11,
    )
    axes.legend(loc="upper right", fontsize=8)


def _ratio(stage: Any) -> float:
    if stage is None or stage.distance.std_ratio is None or stage.distance.std_ratio <= 0:
        return np.nan
    return stage.distance.std_ratio
