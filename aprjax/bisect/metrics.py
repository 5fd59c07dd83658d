"""How far two values of one stage are apart: every measure the reports use, defined once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.spread import SpreadSums

# Elements handled at once: three float64 copies of a chunk stay within a core's second-level cache.
_CHUNK = 1 << 15

# A channel counts as massive when its largest reference value exceeds this multiple of the stage's
# median magnitude. Sun et al. (arXiv:2402.17762) use 1000 for hidden states; after a norm the same
# channels stand out less (1.5B, layer 26, ffn_norm: channel 408 at -146, contracts.md 2.5), so a
# tenth of that is asked here.
MASSIVE_FACTOR = 100.0
# At most this share of the channels is ever set aside: beyond it "massive" has lost its meaning.
MASSIVE_SHARE = 0.01


@dataclass(frozen=True)
class Distance:
    """Distances of a model's value from the reference's, over the same positions and channels.

    Attributes:
        std_ratio: sample standard deviation (ddof = 1) of the model over that of the reference.
        rms_ratio: root mean squares, likewise.
        cosine: of the flattened values.
        rel_l2: `|model - ref| / |ref|`.
        max_abs: largest absolute difference.
        max_abs_at: its (row among the compared positions, channel).
        share_1e3: share of elements whose difference exceeds 1 per mille of the reference's magnitude.
        share_5e3: likewise, 5 per mille.
        count: elements compared; 0 where nothing could be (see `UNMEASURED`).

    A ratio or cosine that has no value (a reference of zeros) is None, never zero.
    """

    std_ratio: float | None
    rms_ratio: float | None
    cosine: float | None
    rel_l2: float | None
    max_abs: float | None
    max_abs_at: tuple[int, int] | None
    share_1e3: float | None
    share_5e3: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "max_abs_at": None if self.max_abs_at is None else list(self.max_abs_at)}


# The distance of a stage that one side lacks: nothing was compared, which is not a difference of zero.
UNMEASURED = Distance(None, None, None, None, None, None, None, None, 0)


class ComparisonError(ValueError):
    """Values that must not be compared: other shapes, or not finite."""


class Sums:
    """The sums that all distances are made of; values may come in several batches of rows.

    `spread`, if given, is told where the differences lie.
    """

    def __init__(self, spread: SpreadSums | None = None) -> None:
        self._sums = np.zeros(6)  # a, b, a*a, b*b, a*b, d*d
        self._largest, self._largest_at = 0.0, (0, 0)
        self._off_1e3 = self._off_5e3 = self._count = self._rows = 0
        self._spread = spread

    def add(self, model: Float[np.ndarray, "position width"], ref: Float[np.ndarray, "position width"]) -> Sums:
        """Adds rows of both sides.

        Raises:
            ComparisonError: the shapes differ. Comparing other selections is an error, not a ratio.
        """
        if model.shape != ref.shape or model.ndim != 2:
            raise ComparisonError(f"the model's value has shape {list(model.shape)}, the reference's {list(ref.shape)}")
        rows, width = model.shape
        if self._spread is not None:
            self._spread.begin(rows, width)
        # Whole rows while they fit, pieces of one row beyond: the order stays that of memory.
        height = max(1, _CHUNK // max(1, width))
        for row in range(0, rows, height):
            for column in range(0, width, _CHUNK):
                self._add_piece(model, ref, slice(row, row + height), slice(column, column + _CHUNK))
        self._count += model.size
        self._rows += rows
        return self

    def _add_piece(self, model: np.ndarray, ref: np.ndarray, rows: slice, columns: slice) -> None:
        x = model[rows, columns].astype(np.float64)
        y = ref[rows, columns].astype(np.float64)
        # Infinities add up to NaN, which is what is to come out.
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.abs(x - y)
            squares, of_ref = delta * delta, y * y
            # Not `@`: BLAS would start its threads beside XLA's for vectors that fit a cache.
            self._sums += (x.sum(), y.sum(), (x * x).sum(), of_ref.sum(), (x * y).sum(), squares.sum())
        row, column = divmod(int(delta.argmax()), delta.shape[1])
        # Written so that NaN, which compares false, is taken as the largest, and the first of it kept.
        if not (delta[row, column] <= self._largest or math.isnan(self._largest)):
            self._largest = float(delta[row, column])
            self._largest_at = (self._rows + rows.start + row, columns.start + column)
        magnitude = np.abs(y)
        self._off_1e3 += int(np.count_nonzero(delta > 1e-3 * magnitude))
        self._off_5e3 += int(np.count_nonzero(delta > 5e-3 * magnitude))
        if self._spread is not None:
            self._spread.add(rows.start, columns.start, squares, of_ref)

    @property
    def rel_l2(self) -> float | None:
        """`|model - ref| / |ref|`; 0 for equal values, None where a reference of zeros leaves no ratio."""
        squared = float(self._sums[5])
        return 0.0 if squared == 0 else _ratio(math.sqrt(squared), math.sqrt(float(self._sums[3])))

    def distance(self) -> Distance:
        """The distances over everything added."""
        sum_a, sum_b, aa, bb, ab, _ = (float(s) for s in self._sums)
        count = self._count
        return Distance(
            std_ratio=_ratio(_sample_std(sum_a, aa, count), _sample_std(sum_b, bb, count)),
            rms_ratio=_ratio(math.sqrt(aa), math.sqrt(bb)),
            # Rounding may carry a cosine past 1.
            cosine=_finite(np.clip(ab / math.sqrt(aa * bb), -1.0, 1.0)) if aa > 0 and bb > 0 else None,
            rel_l2=self.rel_l2,
            max_abs=_finite(self._largest),
            max_abs_at=self._largest_at,
            share_1e3=self._off_1e3 / count if count else 0.0,
            share_5e3=self._off_5e3 / count if count else 0.0,
            count=count,
        )


def distance(model: Float[np.ndarray, "position width"], ref: Float[np.ndarray, "position width"]) -> Distance:
    """The distances of `model` from `ref`; see `Sums.add` for what it raises."""
    return Sums().add(model, ref).distance()


def relative_l2(model: np.ndarray, ref: np.ndarray) -> float | None:
    """`|model - ref| / |ref|` alone; see `Sums.rel_l2`."""
    return Sums().add(model, ref).rel_l2


def massive_channels(ref: Float[np.ndarray, "position width"]) -> tuple[int, ...]:
    """Channels whose largest magnitude exceeds `MASSIVE_FACTOR` times the median magnitude, largest first."""
    if ref.size == 0:
        return ()
    magnitude = np.abs(ref)
    peaks = magnitude.max(axis=0)
    # A thousand-odd samples place a median within a few per cent, which a factor of 100 does not feel.
    median = float(np.median(magnitude.reshape(-1)[:: max(1, magnitude.size // 4096)]))
    channels = np.flatnonzero(peaks > MASSIVE_FACTOR * median) if median > 0 else np.empty(0, int)
    order = channels[np.argsort(-peaks[channels], kind="stable")]
    return tuple(int(c) for c in order[: max(1, int(MASSIVE_SHARE * ref.shape[1]))])


def without_channels(value: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
    """`value` without some channels."""
    return np.delete(value, list(channels), axis=1)


def _sample_std(total: float, squares: float, count: int) -> float:
    if count < 2:
        return 0.0
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1))


def _ratio(numerator: float, denominator: float) -> float | None:
    """None where there is no ratio; 1 where both sides are nothing at all."""
    if not (math.isfinite(numerator) and math.isfinite(denominator)):
        return None
    if denominator == 0:
        return None
    return numerator / denominator


def _finite(value: float) -> float | None:
    """JSON has no NaN: a measure that is not finite is not there."""
    return float(value) if math.isfinite(value) else None
