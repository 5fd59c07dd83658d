"""Logarithmic scales: the colours of heat maps, and axes."""

from __future__ import annotations

import math
from typing import Any

from aprjax.bisect.page.formats import is_number

# Half decades from 1e-8, a sixth of float32's unit roundoff (6e-8), to 1, where nothing of the reference is left.
BINS = 16
_FIRST_DECADE = -8


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
    return [(index, "" if index % 4 else f"1e{_FIRST_DECADE + index // 2}".replace("-", "−")) for index in range(BINS)]


class LogAxis:
    """Positions on a logarithmic axis of a given length, and its ticks."""

    def __init__(self, values: list[float], length: float, *, least: float = 1.0) -> None:
        """Covers `values` (those that are not positive are left out) in whole decades, at least `least` of them."""
        logs = [math.log10(value) for value in values if is_number(value) and value > 0]
        low, high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
        self.low, self.high = math.floor(low), math.ceil(high)
        if self.high - self.low < least:
            self.high = self.low + math.ceil(least)
        self._length = length

    def at(self, value: float) -> float:
        """The distance from the axis's low end; a value beyond an end stays at it."""
        if value <= 0:
            return 0.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self._length * min(1.0, max(0.0, share))

    def ticks(self) -> list[tuple[float, str]]:
        """At most seven: position and label."""
        step = max(1, math.ceil((self.high - self.low) / 6))
        marks = range(self.low, self.high + 1, step)
        return [(self.at(10.0**power), _label(power)) for power in marks]


def _label(power: int) -> str:
    return f"{10**power:g}" if 0 <= power <= 3 else (f"{10.0**power:g}" if power >= -2 else f"1e−{-power}")
