"""Values that were zeroed, multiplied or shifted: everywhere, or in some rows, columns or heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.pair import Pair, Values, distance, slices, spread
from aprjax.bisect.explanations.places import rows_in_words

# A sample that a fitted constant misses by more than this is not worth decoding a tensor for.
_WORTH_VERIFYING = 0.5
_SAMPLED = 64
# Nor is a factor that leaves as much as no factor: it has taken up a part of a rounding.
_CLEARLY_LESS = 0.98


def _zeroed(pair: Pair) -> Iterator[Candidate]:
    rows = pair.rows if pair.same_shape else np.arange(pair.shape[0])
    if rows.size == 0:
        return
    if pair.a.rows(pair.some_rows(_SAMPLED)).any():
        if pair.same_shape and not _any(pair.b, rows):
            yield Candidate("the reference's values are zero where the model's are not", 0.0, "all values")
        else:
            yield from _zero_columns(pair)
        return
    if _any(pair.a, rows):
        return
    every = rows.size == pair.shape[0] or not _nonzero_elsewhere(pair, rows)
    words = "the model's values are all zero" if every else f"the model's {rows_in_words(pair, rows)} are zero"
    yield Candidate(words, 0.0, "all values", {} if every else {"rows": rows.size, "first_row": int(rows[0])})


def _nonzero_elsewhere(pair: Pair, rows: np.ndarray) -> bool:
    """Whether a row that does not differ holds anything: only then the zeros are those of some rows."""
    return _any(pair.a, np.setdiff1d(np.arange(pair.shape[0]), rows))


def _any(values: Values, rows: np.ndarray) -> bool:
    """Whether one of these rows holds anything but zeros."""
    return any(values.rows(rows[window]).any() for window in slices(rows.size, values.shape[1]))


def _zero_columns(pair: Pair) -> Iterator[Candidate]:
    columns = pair.columns
    if columns is None or columns.size in (0, pair.shape[1]) or pair.a.rows(pair.some_rows(_SAMPLED))[:, columns].any():
        return
    residual, basis = _masked(pair, 0.0, columns)
    words = f"the model's {rows_in_words(pair, columns, axis=1)} are zero"
    yield Candidate(words, residual, basis, {"columns": columns.size, "first_column": int(columns[0])})


def _masked(pair: Pair, factor: float, columns: np.ndarray) -> tuple[float, str]:
    """What is left when some columns of the reference are multiplied."""

    def predicted(window: slice) -> np.ndarray:
        values = pair.b.rows(window).copy()
        values[:, columns] *= np.float32(factor)
        return values

    return pair.residual(predicted)


@dataclass(frozen=True)
class _Fit:
    """A constant of the model's values against the reference's, and what it leaves on the sample."""

    value: float
    left: float


def _factor(ours: np.ndarray, theirs: np.ndarray) -> _Fit | None:
    x, y = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    size = float(y @ y)
    if size == 0.0:
        return None
    factor = float(x @ y) / size
    # A median is exact where a sum of products has a rounding error.
    nonzero = y != 0
    exact = float(np.float32(np.median(x[nonzero] / y[nonzero])))
    value = min((factor, exact), key=lambda f: float(np.square(x - f * y).sum()))
    return _Fit(value, distance(ours, (value * y).astype(np.float32).reshape(theirs.shape))) if value else None


def _scaled(pair: Pair) -> Iterator[Candidate]:
    if not pair.same_shape:
        return
    sampled = pair.some_rows(_SAMPLED if not pair.is_vector else 4096)
    ours, theirs = pair.a.rows(sampled), pair.b.rows(sampled)
    fit = _factor(ours, theirs)
    # One factor always explains one value.
    if fit is None or (pair.is_vector and pair.rows.size < 2):
        return
    worth = min(_WORTH_VERIFYING, _CLEARLY_LESS * distance(ours, theirs))
    if fit.left > worth:
        yield Candidate("scaled", fit.left, "sampled rows", {"factor": fit.value}, sampled=True)
    elif not np.isclose(fit.value, 1.0, rtol=1e-6):
        factor = np.float32(fit.value)
        residual, basis = pair.residual(lambda window: pair.b.rows(pair.rows[window]) * factor, pair.rows)
        where = _where(pair, pair.rows)
        words = f"the model's {where} the reference's times {fit.value:.6g}"
        yield Candidate(words, residual, basis, {"factor": fit.value, **_counted(pair)})
    if pair.is_vector:
        return
    yield from _scaled_columns(pair, ours, theirs, worth)
    yield from _scaled_rows(pair, ours, theirs, worth)


def _scaled_columns(pair: Pair, ours: np.ndarray, theirs: np.ndarray, worth: float) -> Iterator[Candidate]:
    """One factor for the differing columns: a head's share of the output projection, say."""
    columns = pair.columns
    if columns is None or columns.size in (0, pair.shape[1]):
        return
    fit = _factor(ours[:, columns], theirs[:, columns])
    if fit is None or fit.left > worth:
        return
    residual, basis = _masked(pair, fit.value, columns)
    words = f"the model's {rows_in_words(pair, columns, axis=1)} are the reference's times {fit.value:.6g}"
    yield Candidate(words, residual, basis, {"factor": fit.value, "columns": columns.size})


def _scaled_rows(pair: Pair, ours: np.ndarray, theirs: np.ndarray, worth: float) -> Iterator[Candidate]:
    """A factor of its own for each row, or for each column: a norm or a scale folded into the weights."""
    for axis, what in ((1, "row"), (0, "column")):
        x, y = ours.astype(np.float64), theirs.astype(np.float64)
        # As many factors as values explain anything.
        if x.shape[axis] < 8:
            continue
        size = np.square(y).sum(axis=axis, keepdims=True)
        factors = np.divide((x * y).sum(axis=axis, keepdims=True), size, out=np.zeros_like(size), where=size > 0)
        if factors.std() <= pair.either_rounding * abs(factors.mean()):
            continue  # one factor for all, and what rounding makes of it
        left = distance(ours, factors * y)
        if left > worth:
            yield Candidate(f"scaled by {what}", left, "sampled rows", {"axis": what}, sampled=True)
            continue
        given = factors if what == "column" else None
        residual, basis = pair.residual(lambda window, given=given: _by_factor(pair, window, given), pair.rows)
        words = f"the model's values are the reference's, each {what} times a factor of its own"
        spans = {"axis": what, "smallest": float(factors.min()), "largest": float(factors.max())}
        yield Candidate(f"{words} ({factors.min():.4g} to {factors.max():.4g})", residual, basis, spans)


def _by_factor(pair: Pair, window: slice, factors: np.ndarray | None) -> np.ndarray:
    """The reference's rows times given factors of the columns, or each times the factor that fits it best."""
    theirs = pair.b.rows(pair.rows[window]).astype(np.float64)
    if factors is not None:
        return (theirs * factors).astype(np.float32)
    ours = pair.a.rows(pair.rows[window]).astype(np.float64)
    size = np.square(theirs).sum(axis=1, keepdims=True)
    fitted = np.divide((ours * theirs).sum(axis=1, keepdims=True), size, out=np.zeros_like(size), where=size > 0)
    return (theirs * fitted).astype(np.float32)


def _shifted(pair: Pair) -> Iterator[Candidate]:
    if not pair.same_shape:
        return
    sampled = pair.some_rows(_SAMPLED if not pair.is_vector else 4096)
    ours, theirs = pair.a.rows(sampled), pair.b.rows(sampled)
    columns = pair.columns if pair.columns is not None and pair.columns.size else np.arange(pair.shape[1])
    delta = (ours[:, columns].astype(np.float64) - theirs[:, columns]).ravel()
    constant = float(np.float32(np.median(delta)))
    # A constant explains one element of a vector, whatever it is: two agree by an accident only.
    if delta.size < 2 or constant == 0.0:
        return
    # Against the spread of the differences: one that is small beside the values would otherwise seem explained.
    left = float(np.sqrt(np.square(delta - constant).mean() / np.square(delta).mean()))
    if left > _WORTH_VERIFYING:
        moved = distance(ours[:, columns], theirs[:, columns] + np.float32(constant))
        yield Candidate("shifted", moved, "sampled rows", {"constant": constant}, sampled=True)
        return

    def predicted(window: slice) -> np.ndarray:
        values = pair.b.rows(pair.rows[window]).copy()
        values[:, columns] += np.float32(constant)
        return values

    residual, basis = pair.residual(predicted, pair.rows)
    words = f"the model's {_where(pair, pair.rows)} the reference's plus {constant:.6g}"
    yield Candidate(words, residual, basis, {"constant": constant, **_counted(pair)})


def _where(pair: Pair, rows: np.ndarray) -> str:
    if rows.size == pair.shape[0]:
        return "values are"
    # One element of a vector or all that differ: zeros stay zero under any factor.
    zeros = np.setdiff1d(np.arange(pair.shape[0]), rows)
    if not pair.b.rows(zeros[spread(zeros.size, 256)]).any():
        return "values are"
    return f"{rows_in_words(pair, rows)} are"


def _counted(pair: Pair) -> dict[str, int]:
    return {} if pair.rows.size == pair.shape[0] else {"rows": pair.rows.size, "first_row": int(pair.rows[0])}


ZEROED = (
    Hypothesis("zeroed", _zeroed, "the converter never wrote these values: convert the model again from the reference"),
)
HYPOTHESES = (
    Hypothesis("scaled", _scaled, "look for a scale applied twice, or folded in by the converter, and convert again"),
    Hypothesis("shifted", _shifted, "look for an offset that the converter adds (a norm stored as weight - 1, say)"),
)
