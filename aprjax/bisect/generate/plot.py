"""The plot of a `generate` report: the margins of the common part."""

from __future__ import annotations

from typing import Any, BinaryIO

from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.generate.report import GenerateReport


def save_plot(report: GenerateReport, target: BinaryIO) -> None:
    """Writes the plot as PNG."""
    save_figure(plot_report(report), target)


def plot_report(report: GenerateReport) -> Any:
    """A matplotlib figure: both sides' margins at every step of the common part, the noise's reach, where they part."""
    figure = new_figure(11, 4)
    axes = figure.add_subplot()
    if report.first_difference is not None and report.first_difference.step == 0:
        axes.text(0.5, 0.5, "they part at the first token", ha="center", va="center", transform=axes.transAxes)
    for key, name, style in (("ref_margin", "reference", "o-"), ("model_margin", "model", ".--")):
        points = [(row["step"] + 1, row[key]) for row in report.rows() if row[key] is not None and row[key] > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
    if report.noise is not None and report.noise["near_tie_gap"] > 0:
        axes.axhline(report.noise["near_tie_gap"], color="#9a6700", linestyle=":", label="reach of the noise")
    if report.first_difference is not None:
        axes.axvline(report.first_difference.step + 1, color="#cf222e", linewidth=1, label="first difference")
    axes.set(xlabel="new token", ylabel="margin (logits)", title=f"{report.prompt.name}: {report.verdict}")
    if report.smallest_margin is not None:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure
