"""The plot of a `chatml` report: every cell of the factorial as a tile, by what became of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aprjax.bisect.chatml.cells import SIDES
from aprjax.bisect.chatml.judged import State
from aprjax.bisect.chatml.report import ChatmlReport
from aprjax.bisect.figure import new_figure

# The letter says the same as the colour.
_SHOWN: Mapping[State, tuple[str, str]] = {
    "clean": ("c", "#d3e9d6"),
    "flagged": ("f", "#fbe7b2"),
    "wrong": ("w", "#f4c095"),
    "loops": ("l", "#e08e8e"),
    "degenerate": ("d", "#b2182b"),
}


def plot_cells(report: ChatmlReport) -> Any:
    """A matplotlib figure: a grid per side, prompts by (wrap, stop tokens, arithmetic), a tile per answer."""
    from matplotlib.patches import Patch, Rectangle

    factorial = report.factorial
    columns = list(dict.fromkeys(key[2:] for key in report.cells))
    columns.sort(key=lambda c: (factorial.wraps.index(c[0]), c[2] == "off", factorial.arithmetics.index(c[1])))
    prompts = list(factorial.prompts)
    figure = new_figure(3 + 0.36 * len(columns) * len(SIDES), 2.6 + 0.34 * len(prompts))
    for axes, side in zip(figure.subplots(1, len(SIDES), sharey=True), SIDES, strict=True):
        for y, prompt in enumerate(prompts):
            for x, (wrap, arithmetic, stop) in enumerate(columns):
                cell = report.cells.get((side, prompt, wrap, arithmetic, stop))
                if cell is None:
                    # Not measured is hatched, and never a colour of its own.
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor="grey", hatch="///"))
                    continue
                letter, colour = _SHOWN[cell.state]
                axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour))
                axes.text(x, y, letter, ha="center", va="center", fontsize=7)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(prompts) - 0.5, -0.5)
        names = [f"{wrap} · stop {stop} · {arithmetic}" for wrap, arithmetic, stop in columns]
        axes.set_xticks(range(len(columns)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(prompts)), prompts, fontsize=8)
        axes.set_title("model" if side == "model" else "reference", fontsize=10)
    states = [Patch(facecolor=colour, label=f"{letter}: {state}") for state, (letter, colour) in _SHOWN.items()]
    figure.legend(handles=states, loc="outside lower center", ncols=len(states), fontsize=8, frameon=False)
    return figure
