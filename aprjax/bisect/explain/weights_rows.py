"""Accidents of whole rows of a matrix: zeroed, scaled, shifted, permuted, copied, replaced.

A row of a matrix is a column of its product, so that these are read from the products alone: the trace's columns are
matched with the file's. A few positions tell rows apart well: of n rows in a space of 7 positions the nearest other one
is n^(-1/6) away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Node, Parameter
from aprjax.bisect.explain.proposals import with_error
from aprjax.bisect.explain.unseen import FACTOR_ERROR
from aprjax.bisect.explain.weights_look import WORTH, Look, looks, with_rows
from aprjax.bisect.explanations.block_fields import LAYOUTS
from aprjax.bisect.explanations.permutations import rope_sources
from aprjax.checkpoint.types import CheckpointError, EncodedTensor

# Positions from which on columns of a product can be told apart.
_LEAST_POSITIONS = 3
# Columns times columns that are compared: a few seconds of one core at a dozen positions.
_MOST_COMPARED = 4e9
# Of a matrix too large for that, so many columns say whether it is a shift.
_SAMPLED_COLUMNS = 512
# Rows that may hold other values, before it is another matrix and no accident of rows.
_MOST_REPLACED = 8
# A fitted number this near a round one is tried as that, too.
_ROUND = 1e-3
# Rows named in a sentence.
_NAMED = 4


def in_words(look: Look, rows: np.ndarray) -> str:
    """`row 7 of k_proj`, `rows 64 to 127 (head 1) of q_proj`, `gate_proj` where it is all of them."""
    name = short(look)
    if rows.size == look.tensor.shape[0]:
        return name
    if rows.size == 1:
        return f"row {int(rows[0])} of {name}"
    head = look.evidence.config.head_dim
    heads = np.unique(rows // head)
    whole = has_heads(look) and heads.size * head == rows.size
    named = f" (head{'s' if heads.size > 1 else ''} {_list(heads)})" if whole else ""
    if int(rows[-1]) - int(rows[0]) + 1 == rows.size:
        return f"rows {int(rows[0])} to {int(rows[-1])}{named} of {name}"
    return f"{rows.size} rows{named or f' ({_list(rows)})'} of {name}"


def _list(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:_NAMED].tolist())) + (" …" if numbers.size > _NAMED else "")


def short(look: Look) -> str:
    """The matrix's name without its layer: `gate_proj`."""
    return look.name.removesuffix(".weight").rpartition(".")[2]


def has_heads(look: Look) -> bool:
    """Whether the rows are those of heads."""
    return short(look) in ("q_proj", "k_proj", "v_proj") and look.tensor.shape[0] % look.evidence.config.head_dim == 0


def each(test: Callable[[Look], Iterator[Candidate]]) -> Callable[[Evidence, Node], Iterator[Candidate]]:
    """A hypothesis about every matrix of a product."""

    def run(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        for look in looks(evidence, node):
            with np.errstate(all="ignore"):
                yield from test(look)

    return run


def zeroed(look: Look) -> Iterator[Candidate]:
    """The products of the wrong rows are all zero."""
    rows = look.wrong
    if look.found[:, rows].any():
        return
    source = np.arange(look.tensor.shape[0])
    source[rows] = -1
    every = rows.size == source.size or not look.found.any()
    words = f"{short(look) if every else in_words(look, rows)} {'is' if every or rows.size == 1 else 'are'} zero"
    yield look.candidate(
        words, {look.name: with_rows(look.tensor, source)}, rows=int(rows.size), first_row=int(rows[0])
    )


def scaled(look: Look) -> Iterator[Candidate]:
    """One factor for all wrong rows, or one for each."""
    rows = look.wrong
    ours, theirs = (side[rows] for side in look.columns)
    size = float(np.square(theirs).sum())
    if not size or rows.size * len(look.x) < _LEAST_POSITIONS:
        return
    factor = float((ours * theirs).sum()) / size
    left = float(np.sqrt(np.square(ours - factor * theirs).sum() / size))
    if left <= WORTH and factor and abs(factor - 1) > left:
        # Encoding again errs alike wherever a row is read: a standard error of white noise would be too small.
        error = left + FACTOR_ERROR * abs(factor)
        where = in_words(look, rows)
        verb = "are" if 1 < rows.size < look.tensor.shape[0] else "is"
        for value in near_values(factor):
            told = {"factor": Parameter(value, error, 1.0), "rows": int(rows.size), "first_row": int(rows[0])}
            words = f"{where} {verb} multiplied by {with_error(value, error)}"
            yield from _multiplied(look, words, rows, np.full(rows.size, value), told)
        return
    if len(look.x) < _LEAST_POSITIONS or rows.size < 2:
        return
    factors = (ours * theirs).sum(axis=1) / np.maximum(np.square(theirs).sum(axis=1), 1e-300)
    left = float(np.sqrt(np.square(ours - factors[:, None] * theirs).sum() / size))
    if left <= WORTH and np.isfinite(factors).all():
        words = f"each of {in_words(look, rows)} is multiplied by a factor of its own"
        words += f" ({factors.min():.4g} to {factors.max():.4g})"
        told = {"smallest": float(factors.min()), "largest": float(factors.max()), "rows": int(rows.size)}
        yield from _multiplied(look, words, rows, factors, told)


def near_values(value: float) -> tuple[float, ...]:
    """A fitted number, behind the round one that it may stand for: encoding again blurs it by some 1e-4."""
    round_one = float(f"{value:.3g}")
    return (round_one, value) if abs(value - round_one) <= _ROUND * abs(value) and value != round_one else (value,)


def _multiplied(
    look: Look, words: str, rows: np.ndarray, factors: np.ndarray, told: dict[str, object]
) -> Iterator[Candidate]:
    every = np.ones(look.tensor.shape[0])
    every[rows] = factors
    yield from look.proposals(
        words,
        lambda some: look.tensor.decode_rows(some) * every[some, None].astype(np.float32),
        lambda: look.whole * every[:, None].astype(np.float32),
        **told,
    )
    blocks = scaled_blocks(look.tensor, every)
    if blocks is not None:
        yield look.candidate(f"{words}, in the scales of its blocks", {look.name: blocks}, **told)


def scaled_blocks(tensor: EncodedTensor, factors: np.ndarray) -> EncodedTensor | None:
    """A matrix whose block scales (and minimums) are multiplied row by row; None where its type has none."""
    layout = LAYOUTS.get(tensor.block_type)
    if layout is None:
        return None
    try:
        packed = tensor.packed().copy()
    except CheckpointError:
        return None
    for part in (layout.scale, layout.minimum):
        if part is not None:
            values = np.ascontiguousarray(packed[..., part]).view("<f2").astype(np.float32) * factors[:, None, None]
            packed[..., part] = np.ascontiguousarray(values.astype("<f2")).view(np.uint8)
    return replace(tensor, data=packed.reshape(-1))


def added(look: Look) -> Iterator[Candidate]:
    """One number added to every weight: its product is that number times the sum of the inputs."""
    rows = look.wrong
    ours, theirs = (side[rows] for side in look.columns)
    total = (look.x.sum(axis=1, dtype=np.float64) * look.weights)[None]
    size = float(np.square(total).sum()) * rows.size
    if not size or rows.size * len(look.x) < _LEAST_POSITIONS:
        return
    constant = float(((ours - theirs) * total).sum()) / size
    missed = float(np.square(ours - theirs - constant * total).sum())
    if not constant or missed > WORTH**2 * float(np.square(ours - theirs).sum()):
        return
    error = float(np.sqrt(missed / size))
    for value in near_values(constant):
        every = np.zeros(look.tensor.shape[0], np.float32)
        every[rows] = value
        yield from look.proposals(
            f"to every weight of {in_words(look, rows)} {with_error(value, error)} is added",
            lambda some, every=every: look.tensor.decode_rows(some) + every[some, None],
            lambda every=every: look.whole + every[:, None],
            constant=Parameter(value, error, 0.0),
            rows=int(rows.size),
        )


def _moves(look: Look, source: np.ndarray) -> bool:
    """Whether rows taken from other places give the products."""
    ours, theirs = look.columns
    moved = np.union1d(np.flatnonzero(source != np.arange(source.size)), look.wrong)
    left = np.linalg.norm(ours[moved] - theirs[source[moved]])
    return bool(left <= WORTH * np.linalg.norm(ours[moved]))


def _moved(look: Look, words: str, source: np.ndarray, **told: object) -> Iterator[Candidate]:
    if _moves(look, source):
        yield look.candidate(words, {look.name: with_rows(look.tensor, source)}, **told)


def shifted(look: Look) -> Iterator[Candidate]:
    """Rows off by one or by a few, round the end or from some row on."""
    size = look.tensor.shape[0]
    here = np.arange(size)
    match = _match(look)
    steps = {1, -1}
    if match is not None:
        rows, there = match
        by = np.sort((rows - there + size // 2) % size - size // 2)
        steps.add(int(by[by.size // 2]))
    for step in sorted(steps - {0}, key=abs):
        count = "one row" if abs(step) == 1 else f"{abs(step)} rows"
        words = f"the rows of {short(look)} are shifted {'down' if step > 0 else 'up'} by {count}"
        yield from _moved(look, words, (here - step) % size, by=step, cyclic=True)
        first = int(look.wrong[0])
        if first or step < 0:
            edge = (
                np.where(here >= max(first, step), here - step, here) if step > 0 else np.minimum(here - step, size - 1)
            )
            yield from _moved(
                look, f"{words}, from row {first} on", edge % size, by=step, cyclic=False, first_row=first
            )


def reversed_rows(look: Look) -> Iterator[Candidate]:
    """The last row first."""
    words = f"the rows of {short(look)} are in reverse order"
    yield from _moved(look, words, np.arange(look.tensor.shape[0])[::-1].copy(), axis="rows")


def rotary(look: Look) -> Iterator[Candidate]:
    """The halves of each head interleaved, or taken apart."""
    head = look.evidence.config.head_dim
    if short(look) not in ("q_proj", "k_proj") or head % 2 or look.tensor.shape[0] % head:
        return
    words = {
        "neighbours": "are interleaved (pairs of neighbours instead of halves)",
        "halves": "are taken apart (halves instead of pairs of neighbours)",
    }
    for order, source in rope_sources(look.tensor.shape[0], head).items():
        yield from _moved(look, f"the rotary halves of each head of {short(look)} {words[order]}", source, order=order)


def heads(look: Look) -> Iterator[Candidate]:
    """Whole heads of rows in other places."""
    head = look.evidence.config.head_dim
    count = look.tensor.shape[0] // head
    if not has_heads(look) or count < 2:
        return
    ours, theirs = (side.reshape(count, -1) for side in look.columns)
    far = np.square(ours[:, None] - theirs[None]).sum(axis=2)
    order = far.argmin(axis=1)
    if np.array_equal(order, np.arange(count)):
        return
    moved = np.flatnonzero(order != np.arange(count))
    named = ", ".join(f"{i} holds {order[i]}" for i in moved[:_NAMED].tolist()) + (" …" if moved.size > _NAMED else "")
    kind = "permuted" if np.unique(order).size == count else "copied"
    source = (order[:, None] * head + np.arange(head)).reshape(-1)
    yield from _moved(
        look, f"the heads of {short(look)} are {kind} ({named})", source, order=order.tolist(), axis="row"
    )


def permuted(look: Look) -> Iterator[Candidate]:
    """Rows in another order, found by their products."""
    yield from _matched(look, copied=False)


def copied(look: Look) -> Iterator[Candidate]:
    """Rows that hold what is also elsewhere."""
    yield from _matched(look, copied=True)


def _matched(look: Look, *, copied: bool) -> Iterator[Candidate]:
    match = _match(look)
    if match is None or match[0].size != look.wrong.size:
        return
    rows, there = match
    if np.array_equal(np.sort(rows), np.sort(there)) is copied:
        return
    source = np.arange(look.tensor.shape[0])
    source[rows] = there
    first = [[int(i), int(j)] for i, j in zip(rows[:16], there[:16], strict=True)]
    if rows.size == 1:
        words = f"row {rows[0]} of {short(look)} holds its row {there[0]}"
    else:
        words = f"{in_words(look, rows)} {'hold other rows of it' if copied else 'are in another order'}"
    yield from _moved(look, words, source, moved=int(rows.size), first_moves=first)


def _match(look: Look) -> tuple[np.ndarray, np.ndarray] | None:
    """The wrong rows and the file's rows that they hold; of a large matrix some of them. None if one has no match."""
    key = ("weights match", look.node, look.name, len(look.evidence.accepted))
    if key not in look.evidence.programs:
        look.evidence.programs[key] = _match_columns(look)
    return look.evidence.programs[key]


def _match_columns(look: Look) -> tuple[np.ndarray, np.ndarray] | None:
    rows = look.wrong
    ours, theirs = look.columns
    if len(look.x) < _LEAST_POSITIONS:
        return None
    if float(rows.size) * len(theirs) * len(look.x) > _MOST_COMPARED:
        rows = rows[np.unique(np.linspace(0, rows.size - 1, _SAMPLED_COLUMNS).astype(int))]
    squares = np.square(theirs).sum(axis=1)
    found = np.empty(rows.size, np.int64)
    step = max(1, (1 << 24) // len(theirs))
    by = 0
    for begin in range(0, rows.size, step):
        some = ours[rows[begin : begin + step]]
        far = squares[None] - 2 * some @ theirs.T
        found[begin : begin + step] = far.argmin(axis=1)
    for index, row in enumerate(rows.tolist()):
        # Of equal rows the one as far away as the match before: duplicates are common.
        if row - by != found[index] and 0 <= row - by < len(theirs):
            same = theirs[row - by] - theirs[found[index]]
            if not same.any():
                found[index] = row - by
        by = row - int(found[index])
    left = np.linalg.norm(ours[rows] - theirs[found], axis=1)
    if (left > WORTH * np.linalg.norm(ours[rows], axis=1) + 1e-12).any() or np.array_equal(found, rows):
        return None
    return rows, found


def replaced(look: Look) -> Iterator[Candidate]:
    """A few rows that hold something else: named, with the smallest change that gives the trace's values."""
    rows = look.wrong
    count, positions = look.tensor.shape[0], len(look.x)
    if not 0 < rows.size <= min(_MOST_REPLACED, count // 16):
        return
    x = look.activations(look.tensor.block_type)
    delta = look.found[:, rows] - look.expected[:, rows]
    change = np.linalg.lstsq(x, delta, rcond=None)[0].T
    own = look.tensor.decode_rows(rows)
    share = float(np.linalg.norm(change) / max(np.linalg.norm(own), 1e-300))

    def values() -> np.ndarray:
        whole = look.whole.copy()
        whole[rows] = own + change.astype(np.float32)
        return whole

    words = (
        f"{in_words(look, rows)} {'hold' if rows.size > 1 else 'holds'} other values, or the kernel computes "
        f"{'them' if rows.size > 1 else 'it'} otherwise: {positions} positions cannot tell (the smallest change that "
        f"gives the trace is {share:.2g} of their norm)"
    )
    if look.tensor.size <= 1 << 26:
        yield look.candidate(words, {look.name: values()}, rows=[int(row) for row in rows], smallest_change=share)
