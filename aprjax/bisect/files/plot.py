"""The plot of a `files` report: which tensors differ, and how far."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from aprjax.bisect.figure import new_figure
from aprjax.bisect.files.report import FilesComparison

# Colours begin at float32's unit roundoff: a smaller difference is none.
_FLOOR = 2.0**-24
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def plot_differences(report: FilesComparison) -> Any:
    """A matplotlib figure: tensors by layer, coloured by relative L2; equal ones white, incomparable ones hatched."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    differences = {difference.name: difference for difference in report.files.tensors}
    found = [(name, _LAYER.fullmatch(name)) for name in differences]
    kinds = list(dict.fromkeys(place[2] if place else name for name, place in found))
    # Up to the last layer that differs: the report does not say how many more there are.
    layers = 1 + max((int(place[1]) for _, place in found if place), default=0)
    values = np.full((max(len(kinds), 1), layers), np.nan)
    figure = new_figure(4.5 + 0.34 * layers, 1.6 + 0.3 * max(len(kinds), 1))
    axes = figure.subplots()
    for name, place in found:
        row, far = kinds.index(place[2] if place else name), differences[name].rel_l2
        # What lies outside the layers fills its row.
        for column in [int(place[1])] if place else range(layers):
            values[row, column] = np.nan if far is None else max(far, _FLOOR)
            if far is None:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor="grey", hatch="///"))
    image = axes.imshow(np.log10(values), aspect="auto", cmap="magma_r", vmin=np.log10(_FLOOR), vmax=1.0)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title(f"{report.verdict}: {len(differences)} tensors not in the same bytes", fontsize=10)
    figure.colorbar(image, ax=axes).set_label("relative L2 (log10)")
    return figure
