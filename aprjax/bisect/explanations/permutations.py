"""Rows or columns of the reference in another order: shifted, heads, rotary pairs, or any permutation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.matching import match, match_heads
from aprjax.bisect.explanations.pair import Pair, distance
from aprjax.bisect.explanations.places import head_axis, rows_in_words
from aprjax.bisect.explanations.rearranged import WORTH_VERIFYING

_AXES = ("row", "column")
# Rows that a shift may leave unexplained at the edge: an offset is one or a few, not a share of the tensor.
_MOST_EDGE = 8


def _mapped(
    pair: Pair, axis: int, source: np.ndarray, words: str, parameters: dict[str, object]
) -> Iterator[Candidate]:
    """Tries `ours[i] = theirs[source[i]]` along an axis."""
    rows, columns, known = pair.sample
    place = (source[rows], columns) if axis == 0 else (rows, source[columns])
    left = distance(known, pair.b.elements(*place))
    if left > WORTH_VERIFYING:
        yield Candidate(words, left, "sampled elements", parameters, sampled=True)
        return
    if axis:
        residual, basis = pair.residual(lambda window: pair.b.rows(window)[:, source])
    else:
        # Rows that stand where they stood are known to be equal, unless they are among those that differ.
        touched = np.union1d(np.flatnonzero(source != np.arange(source.size)), pair.rows)
        residual, basis = pair.residual(lambda window: pair.b.rows(source[touched[window]]), touched)

    def predict(chosen: np.ndarray) -> np.ndarray:
        return pair.b.rows(chosen)[:, source] if axis else pair.b.rows(source[chosen])

    yield Candidate(f"the model's values are the reference's, {words}", residual, basis, parameters, predict=predict)


def _shifted(pair: Pair) -> Iterator[Candidate]:
    """Off by one, or by a few."""
    if not pair.same_shape:
        return
    for axis in (0, 1):
        size = pair.shape[axis]
        if size < 4:
            continue
        found = match(pair, axis, sample=True)
        steps = {1, -1}
        if found is not None:
            # Either way round: a shift beyond half the size is one the other way.
            by = [int((here - there + size // 2) % size - size // 2) for here, there in found]
            steps |= {by[len(by) // 2]}
        for step in sorted(steps - {0}, key=abs):
            yield from _shift(pair, axis, step)


def _shift(pair: Pair, axis: int, step: int) -> Iterator[Candidate]:
    size = pair.shape[axis]
    source = (np.arange(size) - step) % size
    what = "element" if pair.is_vector else _AXES[axis]
    count = f"one {what}" if abs(step) == 1 else f"{abs(step)} {what}s"
    way = ("down" if step > 0 else "up") if axis == 0 else ("right" if step > 0 else "left")
    words = f"shifted {way} by {count}"
    parameters = {"axis": what, "by": step}
    for candidate in _mapped(pair, axis, source, words, {**parameters, "cyclic": True}):
        yield candidate
        if axis == 0 and not candidate.sampled and candidate.residual:
            # Where nothing came round from the other end; rows before an inserted one stand where they stood.
            kept = pair.rows[step:] if step > 0 else pair.rows[:step]
            if abs(step) > _MOST_EDGE or kept.size < 2:
                continue
            residual, basis = pair.residual(lambda window, kept=kept: pair.b.rows(source[kept[window]]), kept)
            first = int(pair.rows[0])
            sentence = f"the model's values are the reference's, {words}, from {what} {first} on"
            edge = {**parameters, "cyclic": False, "first_row": first}
            yield Candidate(sentence, residual, f"{basis} but the edge", edge)


def rope_sources(size: int, head: int) -> dict[str, np.ndarray]:
    """Where each row comes from when the rotary pairs of every head are re-ordered.

    `neighbours`: row 2i + s of a head holds what was row s * head / 2 + i (as llama.cpp's converter permutes Llama's
    q and k); `halves` is the inverse.
    """
    within = np.arange(size).reshape(-1, 2, head // 2)
    return {
        "neighbours": within.swapaxes(1, 2).reshape(-1),
        "halves": np.arange(size).reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1),
    }


def _rotary(pair: Pair) -> Iterator[Candidate]:
    head = pair.ref.config.head_dim
    if not pair.same_shape or head < 4 or head % 2 or pair.shape[0] % head or head_axis(pair) != 0:
        return
    if ".v_proj." in pair.name:
        return  # v is not rotated
    words = {
        "neighbours": "with the rotary halves of each head interleaved (pairs of neighbours instead of halves)",
        "halves": "with the rotary pairs of each head taken apart (halves instead of pairs of neighbours)",
    }
    for order, source in rope_sources(pair.shape[0], head).items():
        yield from _mapped(pair, 0, source, words[order], {"order": order})


def _heads(pair: Pair) -> Iterator[Candidate]:
    axis = head_axis(pair)
    if not pair.same_shape or axis is None:
        return
    order = match_heads(pair, axis)
    if order is None:
        return
    head = pair.ref.config.head_dim
    source = (order[:, None] * head + np.arange(head)).reshape(-1)
    moved = np.flatnonzero(order != np.arange(order.size))
    listed = ", ".join(f"{int(i)} holds {int(order[i])}" for i in moved[:4]) + (" …" if moved.size > 4 else "")
    permuted = np.unique(order).size == order.size
    words = f"with its heads {'permuted' if permuted else 'copied'} ({listed})"
    yield from _mapped(pair, axis, source, words, {"axis": _AXES[axis], "order": [int(i) for i in order]})


def _moved(pair: Pair, *, axis: int, copied: bool = False) -> Iterator[Candidate]:
    """Any permutation; or rows that hold what is also elsewhere."""
    if not pair.same_shape or pair.shape[axis] < 2:
        return
    found = match(pair, axis)
    if found is None:
        return
    source = np.arange(pair.shape[axis])
    here, there = np.array(found, np.int64).T
    source[here] = there
    permuted = np.array_equal(np.sort(here), np.sort(there))
    if permuted == copied:
        return
    what = "element" if pair.is_vector else _AXES[axis]
    if here.size == 1:
        words = f"{what} {here[0]} holding what is its {what} {there[0]}"
    else:
        where = rows_in_words(pair, np.sort(here), axis=axis)
        words = f"{where} {'in another order' if permuted else f'holding other {what}s of it'}"
    pairs = [[int(i), int(j)] for i, j in list(zip(here, there, strict=True))[:16]]
    parameters = {"axis": what, "moved": int(here.size), "first_moves": pairs}
    yield from _mapped(pair, axis, source, words, parameters)


_ORDER = "correct the order in which the converter writes them, and convert the model again from the reference"
_COPIED = "these rows were overwritten or read twice: look at the converter's row index, and convert again"
HYPOTHESES = (
    Hypothesis(
        "rotary-interleaved",
        _rotary,
        "match permutation and rope_type: Qwen2 pairs halves (neox) and needs no permutation of q and k",
    ),
    Hypothesis("heads-permuted", _heads, _ORDER),
    Hypothesis("rows-shifted", _shifted, "look for an offset of one in the converter's row index"),
    Hypothesis("rows-permuted", partial(_moved, axis=0), _ORDER),
    Hypothesis("rows-copied", partial(_moved, axis=0, copied=True), _COPIED),
    Hypothesis("columns-permuted", partial(_moved, axis=1), _ORDER),
    Hypothesis("columns-copied", partial(_moved, axis=1, copied=True), _COPIED),
)
