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
from measured import Table

# Issue "Fast, and at full size", acceptance 5.
LINEAR_WITHIN = 0.2
# Other work on a machine makes wall seconds longer, and processor seconds hardly: these are held to the law.
CLOCKS, JUDGED = ("wall", "processor"), "processor"


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
    deep = sorted((run for run in runs if run.layers > shallow), key=lambda run: run.parameters)
    commands = list(dict.fromkeys(run.command for run in deep))
    if len({run.size for run in deep}) < 2:
        return []
    return [_whole(deep, commands), _beyond(runs, deep, commands, shallow)]


def _whole(deep: Sequence[Run], commands: Sequence[str]) -> tuple[Table, list[str]]:
    rows, misses = [], []
    for command in commands:
        here = [run for run in deep if run.command == command]
        if len(here) < 2:
            continue
        for clock in CLOCKS:
            x, y = [run.parameters / 1e9 for run in here], [getattr(run, clock) for run in here]
            slope = float(np.log(y[-1] / y[0]) / np.log(x[-1] / x[0]))
            if len(here) < 3:
                rows.append((command, clock, y[-1] / y[0], x[-1] / x[0], slope, None, None, None))
                continue
            a, b = line(x, y)
            far = [t / (a + b * p) - 1 for p, t in zip(x, y, strict=True)]
            said = ", ".join(f"{run.size} {one:+.1%}" for run, one in zip(here, far, strict=True))
            rows.append((command, clock, y[-1] / y[0], x[-1] / x[0], slope, a, b, said))
            if clock == JUDGED and max(map(abs, far)) > LINEAR_WITHIN:
                misses.append(f"{command}: {said} from the line, expected at most {LINEAR_WITHIN:.0%}")
    columns = ("command", "clock", "times", "parameters", "exponent", "start-up a, s", "b, s for 10^9", "residuals")
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
        rates: dict[str, float] = {}
        for run in (run for run in deep if run.command == command):
            base = few.get((run.size, command))
            if base is None:
                continue
            parameters = (run.parameters - base.parameters) / 1e9
            wall, processor = run.wall - base.wall, run.processor - base.processor
            rates[run.size] = (processor if JUDGED == "processor" else wall) / parameters
            rows.append((command, run.size, base.processor, wall, processor, parameters, rates[run.size]))
        for size, rate in list(rates.items())[1:]:
            first = next(iter(rates))
            far = rate / rates[first] - 1 if rates[first] > 0 else float("inf")
            if abs(far) > LINEAR_WITHIN:
                misses.append(
                    f"{command}: a layer's parameter takes {far:+.1%} {JUDGED} time on {size} against {first}"
                )
    columns = ("command", "size", f"{shallow} layers, processor s", "the others, wall s", "the others, processor s")
    columns = (*columns, "their parameters, 10^9", f"{JUDGED} s for 10^9")
    note = f"What the full depth takes beyond {shallow} layers of the same widths: neither start-up nor head is in it."
    return Table("Without the start-up", columns, rows, note), misses


def drawn(deep: Sequence[Run]) -> Any:
    """Processor seconds against parameters with each command's line, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, peaks) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    largest = max(run.parameters for run in deep) / 1e9
    for index, command in enumerate(dict.fromkeys(run.command for run in deep)):
        here = sorted((run for run in deep if run.command == command), key=lambda run: run.parameters)
        x, y = [run.parameters / 1e9 for run in here], [getattr(run, JUDGED) for run in here]
        times.plot(x, y, "o", color=f"C{index}", label=command)
        if len(here) > 2:
            a, b = line(x, y)
            times.plot([0, largest], [a, a + b * largest], "-", color=f"C{index}", linewidth=0.8)
        peaks.plot(x, [run.peak_gib for run in here], "o-", color=f"C{index}", label=command)
    times.set_ylabel(f"{JUDGED} seconds (lines: a + b * parameters)")
    peaks.set_ylabel("peak memory, GiB")
    for axes in (times, peaks):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters of one side, 10^9")
    times.legend(frameon=False, fontsize=8)
    return figure
