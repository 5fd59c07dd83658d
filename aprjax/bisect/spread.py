"""Where in a stage's value its difference lies: at which positions, in which channels; small enough to keep."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

# Channels named by number: what fits a small table; the groups show the rest.
TOP_CHANNELS = 8
# Groups of channels: as many bars as a narrow screen shows side by side.
GROUPS = 64


@dataclass(frozen=True)
class Spread:
    """A difference by position and by channel.

    Attributes:
        by_position: little-endian float16 of the base-2 logarithm of each compared position's relative L2.
            Logarithms, because float16 itself ends at 6e-8 and rounding begins there. Minus infinity: equal to the
            bit; NaN: a reference of zeros, or values that are not finite.
        channels: the (channel, share of the squared difference) of the largest shares, at most `TOP_CHANNELS`.
        groups: little-endian float16 of the share of each of at most `GROUPS` runs of neighbouring channels.
        width: channels.
    """

    by_position: bytes
    channels: tuple[tuple[int, float], ...]
    groups: bytes
    width: int

    def positions(self) -> Float[np.ndarray, " position"]:
        """The relative L2 of each compared position."""
        return np.exp2(np.frombuffer(self.by_position, "<f2").astype(np.float32))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; the arrays as base64."""
        return {
            "log2_rel_l2_by_position": base64.b64encode(self.by_position).decode(),
            "channels": [[channel, round(share, 4)] for channel, share in self.channels],
            "share_by_group": base64.b64encode(self.groups).decode(),
            "width": self.width,
        }


class SpreadSums:
    """The squared differences by position and by channel, added up piece by piece."""

    def __init__(self) -> None:
        self._differences: list[np.ndarray] = []
        self._references: list[np.ndarray] = []
        self._channels = np.zeros(0)

    def begin(self, rows: int, width: int) -> None:
        """Announces a value of so many rows; its pieces follow."""
        if not self._channels.size:
            self._channels = np.zeros(width)
        self._differences.append(np.zeros(rows))
        self._references.append(np.zeros(rows))

    def add(self, row: int, column: int, difference: np.ndarray, reference: np.ndarray) -> None:
        """Adds a piece: the squares of the difference and of the reference, and where the piece begins."""
        rows, columns = difference.shape
        self._differences[-1][row : row + rows] += difference.sum(axis=1)
        self._references[-1][row : row + rows] += reference.sum(axis=1)
        self._channels[column : column + columns] += difference.sum(axis=0)

    def spread(self) -> Spread | None:
        """What was added; None where there is no difference, or nothing was added."""
        if not self._differences:
            return None
        difference, reference = np.concatenate(self._differences), np.concatenate(self._references)
        if not difference.any():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            # Half the logarithm of squares; no ratio to a reference of zeros, unless nothing differs either.
            logs = 0.5 * (np.log2(difference) - np.log2(reference))
            logs[reference == 0] = np.nan
            logs[difference == 0] = -np.inf
            logs[~np.isfinite(difference)] = np.nan
            shares = self._channels / self._channels.sum()
        starts = np.unique(np.linspace(0, shares.size, min(GROUPS, shares.size), endpoint=False).astype(int))
        known = np.flatnonzero(shares > 0) if np.isfinite(shares).all() else np.empty(0, int)
        largest = known[np.argsort(-shares[known], kind="stable")[:TOP_CHANNELS]]
        return Spread(
            logs.astype("<f2").tobytes(),
            tuple((int(channel), float(shares[channel])) for channel in largest),
            np.add.reduceat(shares, starts).astype("<f2").tobytes(),
            int(shares.size),
        )
