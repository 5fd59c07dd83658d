"""Figures of reports: matplotlib figures that a notebook shows, without pyplot and whatever backend is set."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of pictures in a report's folder, and of those in a notebook, which stand in a column of text.
_DPI, _NOTEBOOK_DPI = 110, 80


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, in matplotlib's constrained layout."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, target: Path | BinaryIO) -> None:
    """Writes a figure as PNG."""
    figure.savefig(target, dpi=_DPI, format="png")


@cache
def _figure_class() -> Any:
    """Made when the first figure is: matplotlib takes half a second to import."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that shows itself at the end of a notebook's cell; pyplot knows nothing of it."""

        def _repr_png_(self) -> bytes:
            target = io.BytesIO()
            self.savefig(target, dpi=_NOTEBOOK_DPI, format="png")
            return target.getvalue()

    return ShownFigure
