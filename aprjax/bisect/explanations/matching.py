"""Which row (or column, or head) of the reference is it that the model holds here?"""

from __future__ import annotations

import numpy as np

from aprjax.bisect.explanations.names import first_columns
from aprjax.bisect.explanations.pair import Pair, Values, spread

# Elements of a row that stand for it: unrelated ones have a cosine of 0 +- 1/16.
_SIGNATURE = 256
# The cosine of a row with itself after a four-bit rounding is above 0.98; a few hundred thousand unrelated ones
# reach 5 standard deviations, 0.3.
_SAME = 0.8
_SAMPLED = 16
# Rows times rows times elements of the signatures compared: a second of one core.
_PRODUCTS = 5e10


def match(pair: Pair, axis: int, *, sample: bool = False) -> list[tuple[int, int]] | None:
    """`(model's index, reference's index)` of the differing rows or columns, where every one is found elsewhere.

    Args:
        pair: the tensors.
        axis: 0 matches rows, 1 columns.
        sample: match a few only.

    Returns:
        None where one of them is not the reference's, or is where it was.
    """
    size = pair.shape[axis]
    differing = pair.rows if axis == 0 else (pair.columns if pair.columns is not None else np.arange(size))
    if differing.size == 0 or pair.shape[1 - axis] == 0:
        return None
    theirs = pair.kept(f"signatures {axis}", lambda: _signatures(pair, pair.b, axis, None))
    some = differing[spread(differing.size, _SAMPLED)]
    first = pair.kept(f"sampled match {axis}", lambda: _match_some(_signatures(pair, pair.a, axis, some), some, theirs))
    if first is None or sample:
        return first
    return pair.kept(
        f"match {axis}", lambda: _match_some(_signatures(pair, pair.a, axis, differing), differing, theirs)
    )


def _signatures(pair: Pair, values: Values, axis: int, index: np.ndarray | None) -> np.ndarray:
    """float32 `[indices, signature]`; all rows or columns where no index is given."""
    if axis == 0:
        rows = slice(None) if index is None else index
        if values.addressable and pair.shape[1] > _SIGNATURE:
            return first_columns(values.tensor, rows, _SIGNATURE)
        return values.rows(rows)[:, :_SIGNATURE]
    looked = spread(pair.shape[0], _SIGNATURE)
    columns = values.rows(looked).T
    return np.ascontiguousarray(columns if index is None else columns[index])


def _match_some(ours: np.ndarray, index: np.ndarray, theirs: np.ndarray) -> list[tuple[int, int]] | None:
    exact = _match_exactly(ours, index, theirs)
    if exact is not None or ours.shape[1] < 32:
        return exact
    if float(len(ours)) * len(theirs) * ours.shape[1] > _PRODUCTS:
        return None
    a, b = _normalised(ours), _normalised(theirs)
    found = []
    step = max(1, (1 << 24) // max(1, len(b)))
    for start in range(0, len(a), step):
        cosines = a[start : start + step] @ b.T
        best = cosines.argmax(axis=1)
        if (cosines[np.arange(len(best)), best] < _SAME).any():
            return None
        found += list(zip(index[start : start + step].tolist(), best.tolist(), strict=True))
    return found if any(here != there for here, there in found) else None


def _match_exactly(ours: np.ndarray, index: np.ndarray, theirs: np.ndarray) -> list[tuple[int, int]] | None:
    """By equal bytes. Of several equal ones, the one as far away as the match before: duplicates are common."""
    wanted = {row.tobytes() for row in ours}
    places: dict[bytes, list[int]] = {}
    for there, row in enumerate(theirs):
        key = row.tobytes()
        if key in wanted:
            places.setdefault(key, []).append(there)
    found: list[tuple[int, int]] = []
    by = 0
    for here, row in zip(index.tolist(), ours, strict=True):
        candidates = places.get(row.tobytes())
        if candidates is None:
            return None
        there = min(candidates, key=lambda place, here=here, by=by: abs(place - here - by))
        by = there - here
        found.append((here, there))
    return found if any(here != there for here, there in found) else None


def _normalised(rows: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows / np.where(norms > 0, norms, np.float32(1))


def match_heads(pair: Pair, axis: int) -> np.ndarray | None:
    """For each head of the model, the reference's head that it holds; None where one is none of them, or all are."""
    head = pair.ref.config.head_dim
    count = pair.shape[axis] // head
    if count < 2:
        return None
    looked = spread(pair.shape[1 - axis], 64)
    parts = []
    for values in (pair.a, pair.b):
        some = values.rows(looked).T if axis else values.rows(slice(None))[:, looked]
        parts.append(_normalised(some.reshape(count, -1)))
    cosines = parts[0] @ parts[1].T
    order = cosines.argmax(axis=1)
    order = np.where(cosines.diagonal() >= cosines.max(axis=1), np.arange(count), order)
    if (cosines.max(axis=1) < _SAME).any() or np.array_equal(order, np.arange(count)):
        return None
    return order
