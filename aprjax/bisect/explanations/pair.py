"""Two tensors of one name, decoded only where somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from aprjax.bisect.explanations.rounding import rounding_of
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor

# Elements decoded at a time: 1 MiB of float32, which stays in a core's cache with its float64 copy.
SLICE_ELEMENTS = 1 << 18
# A tensor that has to be decoded whole is held as float32: 512 MiB at most.
WHOLE_LIMIT = 1 << 27
# A prediction is first tried on so many elements. Unrelated values have a relative distance of sqrt(2) +- 0.12 there.
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 16
# A row's rounding errors against those of its tensor: rows differ in how well they quantize, but not by this much.
_STRANGE_ROW = 8.0

Kept = TypeVar("Kept")
RowIndex = slice | Int[np.ndarray, " rows"]


class Values:
    """A tensor as a matrix of values; a vector has one column, so that its elements are rows.

    Attributes:
        tensor: what is decoded.
        shape: rows and columns.
    """

    def __init__(self, tensor: EncodedTensor) -> None:
        self.tensor = tensor
        rows = tensor.shape[0] if tensor.shape else 1
        self.shape = (rows, tensor.size // rows if rows else 0)

    @cached_property
    def addressable(self) -> bool:
        """Whether rows can be decoded one by one."""
        if len(self.tensor.shape) < 2:
            return False
        try:
            return self.tensor.packed().size > 0
        except CheckpointError:
            return False

    @cached_property
    def whole(self) -> Float[np.ndarray, "rows columns"]:
        """All values."""
        return self.tensor.decode().reshape(self.shape)

    def rows(self, index: RowIndex) -> Float[np.ndarray, "rows columns"]:
        """Some rows."""
        if "whole" in self.__dict__ or not self.addressable:
            return self.whole[index]
        return self.tensor.decode_rows(index).reshape(-1, self.shape[1])

    def elements(self, rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Single elements."""
        distinct, place = np.unique(rows, return_inverse=True)
        return self.rows(distinct)[place, columns]


def slices(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive ranges of rows, each about `SLICE_ELEMENTS` large."""
    step = max(1, SLICE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass
class Pair:
    """The tensor of one name in both files, and what is known of it before the search.

    Attributes:
        name: canonical name.
        ours: the model's.
        theirs: the reference's.
        model: the model's checkpoint, with its config.
        ref: the reference's.
        rel_l2: of the decoded values; None where they are not finite.
        rows: the differing rows, in order; of a vector, its differing elements.
        columns: the differing columns; None where nobody counted.
        row_errors: squared distance of each differing row.
        row_norms: squared norm of each differing row of the reference.
    """

    name: str
    ours: EncodedTensor
    theirs: EncodedTensor
    model: Checkpoint
    ref: Checkpoint
    rel_l2: float | None
    rows: Int[np.ndarray, " differing"]
    columns: Int[np.ndarray, " differing"] | None = None
    row_errors: Float[np.ndarray, " differing"] | None = None
    row_norms: Float[np.ndarray, " differing"] | None = None
    a: Values = field(init=False)
    b: Values = field(init=False)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.a, self.b = Values(self.ours), Values(self.theirs)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the model's tensor."""
        return self.a.shape

    @property
    def same_shape(self) -> bool:
        """Whether element stands by element."""
        return self.ours.shape == self.theirs.shape

    @property
    def is_vector(self) -> bool:
        """A bias or a norm."""
        return len(self.ours.shape) < 2

    @property
    def same_encoding(self) -> bool:
        """Whether bytes can be compared with bytes."""
        return (self.ours.block_type, self.ours.row_padded) == (self.theirs.block_type, self.theirs.row_padded)

    def kept(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What several hypotheses need, made once."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @cached_property
    def own_rounding(self) -> float:
        """Relative rms of what storing values in the model's block type costs."""
        return rounding_of(self.a.rows(self.some_rows(16)), self.ours)

    @cached_property
    def either_rounding(self) -> float:
        """The same of the coarser of the two types: the model may hold what the reference's was rounded from."""
        return max(self.own_rounding, rounding_of(self.b.rows(spread(self.b.shape[0], 16)), self.theirs))

    def some_rows(self, count: int) -> Int[np.ndarray, " rows"]:
        """Differing rows, evenly spread; any rows where none are known."""
        known = self.rows if self.rows.size else np.arange(self.shape[0])
        return known[spread(known.size, count)]

    def some_columns(self, count: int) -> Int[np.ndarray, " columns"]:
        """Differing columns, evenly spread."""
        known = self.columns if self.columns is not None and self.columns.size else np.arange(self.shape[1])
        return known[spread(known.size, count)]

    @cached_property
    def sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns and the model's values of the elements that predictions are first tried on."""
        count = _SAMPLE_ROWS if self.shape[1] > 1 else _SAMPLE_ROWS * _SAMPLE_COLUMNS
        rows, columns = np.meshgrid(self.some_rows(count), self.some_columns(_SAMPLE_COLUMNS), indexing="ij")
        rows, columns = rows.ravel(), columns.ravel()
        return rows, columns, self.a.elements(rows, columns)

    def residual(
        self, predicted: Callable[[slice], np.ndarray], rows: Int[np.ndarray, " rows"] | None = None
    ) -> tuple[float, str]:
        """What a prediction leaves of the model's values, and on what it was measured.

        Args:
            predicted: the predicted rows, float32 `[rows, columns]`, of a slice of `rows`.
            rows: rows that the prediction touches; all by default. The norm is of the predicted values in them.
        """
        count = self.shape[0] if rows is None else rows.size
        errors, norms = np.zeros(count), np.zeros(count)
        for window in slices(count, self.shape[1]):
            ours = self.a.rows(window if rows is None else rows[window])
            other = predicted(window).astype(np.float64)
            missed = ours - other
            errors[window] = np.einsum("ij,ij->i", missed, missed)
            norms[window] = np.einsum("ij,ij->i", other, other)
        return self.judged(errors, norms), "all values"

    def judged(self, errors: Float[np.ndarray, " rows"], norms: Float[np.ndarray, " rows"]) -> float:
        """The residual of squared distances by row: of all rows together, or of the worst if that is no rounding.

        Rounding spreads evenly; one strange row among thousands would vanish in their sum.
        """
        together = relative(float(errors.sum()), float(norms.sum()))
        if together == 0.0 or not np.isfinite(together):
            return together
        usual = np.maximum(norms, norms.mean())
        worst = float(np.sqrt((errors / usual).max()))
        return max(worst, together) if worst > min(1.0, _STRANGE_ROW * self.either_rounding) else together


def relative(missed: float, size: float) -> float:
    """The root of a ratio of squares; of a prediction that is all zero, infinite unless it is met."""
    return float(np.sqrt(missed / size)) if size else (float("inf") if missed else 0.0)


def distance(ours: np.ndarray, predicted: np.ndarray) -> float:
    """Relative L2 of a few values, 0.0 where they are equal bit for bit."""
    x, y = ours.astype(np.float64), predicted.astype(np.float64)
    return relative(float(np.square(x - y).sum()), float(np.square(y).sum()))


def spread(size: int, count: int) -> np.ndarray:
    """At most `count` indices below `size`, evenly spread, each once."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64)) if size else np.empty(0, np.int64)
