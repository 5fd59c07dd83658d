"""Rows and columns in words: ranges, and heads where they are whole heads."""

from __future__ import annotations

import numpy as np

from aprjax.bisect.explanations.pair import Pair

_LISTED = 4
# Which axis of which projection has the heads.
_HEAD_ROWS = ("q_proj", "k_proj", "v_proj")
_HEAD_COLUMNS = ("o_proj",)


def head_axis(pair: Pair) -> int | None:
    """0 where the rows are heads, 1 where the columns are, None where neither."""
    size = pair.ref.config.head_dim
    for axis, leaves in ((0, _HEAD_ROWS), (1, _HEAD_COLUMNS)):
        if any(f".{leaf}." in pair.name for leaf in leaves) and size and pair.shape[axis] % size == 0:
            return axis
    return None


def rows_in_words(pair: Pair, index: np.ndarray, *, axis: int = 0) -> str:
    """`row 7`, `rows 64 to 127 (head 1)`, `12 rows (the first is 3)`; elements of a vector, columns along axis 1."""
    one = "column" if axis else ("element" if pair.is_vector else "row")
    if index.size == 1:
        return f"{one} {int(index[0])}"
    size = pair.ref.config.head_dim
    heads = ""
    if head_axis(pair) == axis and index.size % size == 0:
        found = np.unique(index // size)
        if found.size * size == index.size:
            numbers = ", ".join(map(str, found[:_LISTED])) + (" …" if found.size > _LISTED else "")
            heads = f" (head{'s' if found.size > 1 else ''} {numbers})"
    if int(index[-1]) - int(index[0]) + 1 == index.size:
        return f"{one}s {int(index[0])} to {int(index[-1])}{heads}"
    return f"{index.size} {one}s{heads or f' (the first is {int(index[0])})'}"
