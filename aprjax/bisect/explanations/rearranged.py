"""The reference's values in another place: transposed, dimensions exchanged, rows or their order reversed.

Each is a map from the model's element `(row, column)` to the reference's; a few elements say whether it is worth
decoding more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.pair import WHOLE_LIMIT, Pair, distance

# Unrelated values are sqrt(2) +- 0.12 apart on the sample, re-encoded ones by their rounding.
WORTH_VERIFYING = 0.8
# A tensor too large to be held whole is judged on so many rows.
_FEW_ROWS = 16
_Map = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def by_elements(pair: Pair, words: str, where: _Map, **parameters: object) -> Iterator[Candidate]:
    """Tries a map on the sample, then on all values (on some rows of a tensor too large to be held whole)."""
    rows, columns, known = pair.sample
    left = distance(known, pair.b.elements(*where(rows, columns)))
    if left > WORTH_VERIFYING:
        yield Candidate(words, left, "sampled elements", parameters, sampled=True)
        return
    every = np.arange(pair.shape[1])

    def predict(chosen: np.ndarray) -> np.ndarray:
        i, j = np.meshgrid(chosen, every, indexing="ij")
        if pair.theirs.size <= WHOLE_LIMIT:
            return pair.b.whole[where(i, j)]
        return pair.b.elements(*(index.ravel() for index in where(i, j))).reshape(i.shape)

    if pair.theirs.size <= WHOLE_LIMIT:
        residual, basis = pair.residual(lambda window: predict(np.arange(window.start, window.stop)))
    else:
        chosen = pair.some_rows(_FEW_ROWS)
        residual, basis = distance(pair.a.rows(chosen), predict(chosen)), f"{chosen.size} sampled rows"
    sentence = f"the model's values are the reference's, {words}"
    yield Candidate(sentence, residual, basis, dict(parameters), predict=predict)


def _transposed(pair: Pair) -> Iterator[Candidate]:
    if not pair.is_vector and pair.a.shape == pair.b.shape[::-1]:
        yield from by_elements(pair, "transposed", lambda i, j: (j, i))


def _exchanged(pair: Pair) -> Iterator[Candidate]:
    """The same sequence of values under the shape reversed: a reader that takes ggml's order of dimensions for C's."""
    if pair.is_vector or min(pair.shape) == 1:
        return
    (rows, columns), theirs = pair.shape, pair.b.shape
    if theirs == (columns, rows) and rows != columns:
        words = "the same sequence under the shape with its two dimensions exchanged"
        yield from by_elements(pair, words, lambda i, j: np.divmod(i * columns + j, theirs[1]))
    elif theirs == (rows, columns) and rows != columns:
        # Transposed, and the shape written as it was; then the inverse of that.
        back = partial(flat_transposed, rows=rows, columns=columns)
        yield from by_elements(pair, "with its two dimensions exchanged", back, order="transposed")
        forth = partial(read_transposed, rows=rows, columns=columns)
        yield from by_elements(pair, "with its two dimensions exchanged", forth, order="read as transposed")


def flat_transposed(i: np.ndarray, j: np.ndarray, *, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """`theirs.T.reshape(rows, columns)`."""
    column, row = np.divmod(i * columns + j, rows)
    return row, column


def read_transposed(i: np.ndarray, j: np.ndarray, *, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """`theirs.reshape(columns, rows).T`."""
    row, column = np.divmod(j * rows + i, columns)
    return row, column


def _reversed(pair: Pair) -> Iterator[Candidate]:
    if not pair.same_shape:
        return
    rows, columns = pair.shape
    if columns > 1:
        yield from by_elements(pair, "with every row reversed", lambda i, j: (i, columns - 1 - j), axis="columns")
    words = "in reverse order" if pair.is_vector else "with its rows in reverse order"
    yield from by_elements(pair, words, lambda i, j: (rows - 1 - i, j), axis="rows")
    if columns > 1:
        both = "with rows and columns in reverse order"
        yield from by_elements(pair, both, lambda i, j: (rows - 1 - i, columns - 1 - j), axis="both")


HYPOTHESES = (
    Hypothesis("transposed", _transposed, "do not transpose on conversion: GGUF lists the dimensions innermost first"),
    Hypothesis(
        "dimensions-exchanged",
        _exchanged,
        "write the shape in the container's own order: GGUF lists the dimensions innermost first",
    ),
    Hypothesis("reversed", _reversed, "correct the order in which the converter writes the elements"),
)
