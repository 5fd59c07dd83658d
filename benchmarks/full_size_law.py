"""How the times of `full_size.py` grow with the parameters: a line through the sizes, and a layer's parameters alone.

The issue's law is linear in the parameters within 20 %. The line `a + b * parameters` has a start-up, which is the same
for every size: imports, opening, loading compiled programs. What the full depth takes beyond few layers of the same
widths has none, and is compared as seconds for a billion of these layers' parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from measured import Table, shown

# Issue "Fast, and at full size", acceptance 5.
LINEAR_WITHIN = 0.2


@dataclass(frozen=True)
class Run:
    """One command on one pair.

    Attributes:
        size: of the model.
        layers: that it has: all, or few.
        command: what ran, by its name in `COMMANDS`.
        parameters: of one side.
        tokens: that both sides were fed.
        wall: seconds.
        processor: seconds of all threads and children.
        peak_gib: the largest resident size.
        found: where the fault was found.
        right: whether it was planted there.
        said: the report's reason.
    """

    size: str
    layers: int
    command: str
    parameters: int
    tokens: int
    wall: float
    processor: float
    peak_gib: float
    found: str
    right: bool
    said: str

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What tells runs apart."""
        return self.size, self.layers, self.command, self.tokens


def line(parameters: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """`a` and `b` of `a + b * parameters` with the least squares of *relative* residuals, `a` never below zero.

    Relative, since the law is held to a share of each time; and no start-up takes less than nothing.
    """
    x, y = np.asarray(parameters, float), np.asarray(seconds, float)
    scaled = np.stack([1 / y, x / y], axis=1)
    (a, b), *_ = np.linalg.lstsq(scaled, np.ones(len(y)), rcond=None)
    if a < 0:
        a, b = 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    return float(a), float(b)


def law_tables(runs: Sequence[Run], shallow: int) -> list[tuple[Table, list[str]]]:
    """The tables, each with the bars that it misses; none of fewer than two sizes."""
    deep = [run for run in runs if run.layers > shallow]
    commands = list(dict.fromkeys(run.command for run in deep))
    if len({run.size for run in deep}) < 2:
        return []
    return [_whole(deep, commands), _beyond(runs, deep, commands, shallow)]


def _whole(deep: Sequence[Run], commands: Sequence[str]) -> tuple[Table, list[str]]:
    rows, misses = [], []
    for command in commands:
        here = sorted((run for run in deep if run.command == command), key=lambda run: run.parameters)
        if len(here) < 2:
            continue
        x, y = [run.parameters / 1e9 for run in here], [run.wall for run in here]
        slope = float(np.log(y[-1] / y[0]) / np.log(x[-1] / x[0]))
        a, b = line(x, y) if len(here) > 2 else (None, None)
        far = None if a is None or b is None else [t / (a + b * p) - 1 for p, t in zip(x, y, strict=True)]
        said = None if far is None else ", ".join(f"{r.size} {one:+.1%}" for r, one in zip(here, far, strict=True))
        rows.append((command, y[-1] / y[0], x[-1] / x[0], slope, a, b, said))
        if far is not None and max(map(abs, far)) > LINEAR_WITHIN:
            misses.append(f"{command}: {said} from the line, expected at most {LINEAR_WITHIN:.0%}")
    columns = ("command", "times", "parameters", "exponent", "start-up a, s", "b, s for 10^9", "residuals")
    note = (
        "Times and parameters of the largest size over those of the smallest, and the exponent of the power law that "
        "joins them. The line a + b * parameters has the least squares of relative residuals; with three sizes it has "
        "one degree of freedom left."
    )
    return Table("Whole time against parameters", columns, rows, note), misses


def _beyond(runs: Sequence[Run], deep: Sequence[Run], commands: Sequence[str], shallow: int) -> tuple[Table, list[str]]:
    few = {(run.size, run.command): run for run in runs if run.layers == shallow}
    rows, misses = [], []
    for command in commands:
        rates = {}
        for run in sorted((run for run in deep if run.command == command), key=lambda run: run.parameters):
            base = few.get((run.size, command))
            if base is not None:
                added = (run.parameters - base.parameters) / 1e9
                rates[run.size] = (run.wall - base.wall) / added
                rows.append((command, run.size, base.wall, run.wall - base.wall, added, rates[run.size]))
        if len(rates) > 1:
            middle = float(np.sqrt(min(rates.values()) * max(rates.values()))) if min(rates.values()) > 0 else 0.0
            if not middle or max(rates.values()) / middle - 1 > LINEAR_WITHIN:
                said = ", ".join(f"{size} {shown(rate)}" for size, rate in rates.items())
                misses.append(
                    f"{command}: seconds for 10^9 parameters of the layers: {said}; expected within "
                    f"{LINEAR_WITHIN:.0%} of their middle"
                )
    columns = ("command", "size", f"{shallow} layers, s", "the others, s", "their parameters, 10^9", "s for 10^9")
    note = (
        f"What the full depth takes beyond {shallow} layers of the same widths: nothing of it is start-up, or the head."
    )
    return Table("Without the start-up", columns, rows, note), misses


def drawn(deep: Sequence[Run]) -> Any:
    """Wall seconds against parameters with each command's line, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, peaks) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    largest = max(run.parameters for run in deep) / 1e9
    for index, command in enumerate(dict.fromkeys(run.command for run in deep)):
        here = sorted((run for run in deep if run.command == command), key=lambda run: run.parameters)
        x, y = [run.parameters / 1e9 for run in here], [run.wall for run in here]
        times.plot(x, y, "o", color=f"C{index}", label=command)
        if len(here) > 2:
            a, b = line(x, y)
            times.plot([0, largest], [a, a + b * largest], "-", color=f"C{index}", linewidth=0.8)
        peaks.plot(x, [run.peak_gib for run in here], "o-", color=f"C{index}", label=command)
    times.set_ylabel("wall seconds (lines: a + b * parameters)")
    peaks.set_ylabel("peak memory, GiB")
    for axes in (times, peaks):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters of one side, 10^9")
    times.legend(frameon=False, fontsize=8)
    return figure
