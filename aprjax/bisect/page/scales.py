"""Logarithmic scales: the colours of heat maps, and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aprjax.bisect.page.formats import is_number

# Half decades from 1e-7, just above float32's unit roundoff (6e-8), so that rounding stays pale, to 10; a stage whose
# direction is lost differs by about sqrt(2).
BINS = 16
_FIRST_DECADE = -7


def colour_bin(value: Any) -> str:
    """The class of a colour: `0` to `15`, `zero` for equal to the bit, `none` for what was not measured."""
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return "none"
    if value == 0:
        return "zero"
    if math.isinf(value):
        return str(BINS - 1)
    return str(min(BINS - 1, max(0, math.floor(2 * (math.log10(abs(value)) - _FIRST_DECADE)))))


def legend() -> list[tuple[int, str]]:
    """The bins and the labels of those at which a decade begins."""
    return [(index, "" if index % 4 else _label(_FIRST_DECADE + index // 2)) for index in range(BINS)]


class LogAxis:
    """Positions on a logarithmic axis of a given length, and its ticks."""

    def __init__(self, values: Sequence[float], length: float, *, marks: Sequence[float] = ()) -> None:
        """Covers what is positive of `values` in whole decades; with `marks` for its ticks, as far as both reach."""
        logs = [math.log10(value) for value in (*values, *marks) if is_number(value) and value > 0]
        low, high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
        self.low, self.high = (low - 0.02, high + 0.02) if marks else (math.floor(low), math.ceil(high))
        if self.high <= self.low:
            self.high = self.low + 1
        self._length, self._marks = length, marks

    def at(self, value: float) -> float:
        """The distance from the axis's low end; a value beyond an end stays at it."""
        if value <= 0:
            return 0.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self._length * min(1.0, max(0.0, share))

    def ticks(self) -> list[tuple[float, str]]:
        """At most seven decades, or the marks: position and label."""
        decades = range(math.ceil(self.low), math.floor(self.high) + 1)
        step = max(1, math.ceil(len(decades) / 6))
        # Marks are those near 1; where values reach far beyond them their decades are marked, too.
        far = [power for power in decades[::step] if not self._marks or not -1 <= power <= 1]
        return [(self.at(mark), f"{mark:g}") for mark in self._marks] + [(self.at(10.0**p), _label(p)) for p in far]


def _label(power: int) -> str:
    return f"{10.0**power:g}" if -2 <= power <= 3 else f"1e{power}".replace("-", "\u2212")
