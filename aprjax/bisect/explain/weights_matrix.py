"""Accidents of whole matrices: transposed, another tensor's, columns moved, scaled or lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from aprjax.bisect.cause import STAGE_TENSORS
from aprjax.bisect.explain.hypothesis import Candidate, Node
from aprjax.bisect.explain.weights_look import WHOLE_LIMIT, WORTH, Look, looks, looks_afresh
from aprjax.bisect.explain.weights_rows import short
from aprjax.bisect.explanations.rearranged import flat_transposed, read_transposed
from aprjax.checkpoint.types import CheckpointError, EncodedTensor
from aprjax.qwen2.stages import OUTSIDE, Stage

# Rows of another tensor that are tried first.
_FIRST_ROWS = 6
# Outputs that the heads of a product are told apart on.
_OUTPUTS = 512
# Products of one head's inputs with another head's weights are fitted together: at most so many heads.
_MOST_HEADS = 40


def transposed(look: Look) -> Iterator[Candidate]:
    """Square, and read column by column."""
    rows, columns = look.tensor.shape
    if rows == columns and look.tensor.size <= WHOLE_LIMIT:
        words = f"{short(look)} is transposed"
        yield from look.proposals(words, lambda some: look.whole.T[some], lambda: look.whole.T)


def exchanged(look: Look) -> Iterator[Candidate]:
    """The same sequence of values under the shape with its two dimensions exchanged, and the inverse."""
    rows, columns = look.tensor.shape
    if rows == columns or look.tensor.size > WHOLE_LIMIT:
        return
    for order, where in (("transposed", flat_transposed), ("read as transposed", read_transposed)):
        words = f"{short(look)} is read with its two dimensions exchanged ({order})"
        yield from look.proposals(words, _elements(look, where), _elements_of_all(look, where), order=order)


def _elements(look: Look, where: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[[np.ndarray], np.ndarray]:
    rows, columns = look.tensor.shape

    def some(chosen: np.ndarray) -> np.ndarray:
        i, j = np.meshgrid(chosen, np.arange(columns), indexing="ij")
        return look.whole[where(i, j, rows=rows, columns=columns)]

    return some


def _elements_of_all(look: Look, where: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[[], np.ndarray]:
    rows, columns = look.tensor.shape
    if where is flat_transposed:
        return lambda: look.whole.T.reshape(rows, columns)
    return lambda: look.whole.reshape(columns, rows).T


def reversed_columns(look: Look) -> Iterator[Candidate]:
    """Every row reversed, alone or with the order of the rows."""
    every = np.arange(look.tensor.shape[0])
    for axis, order in (("columns", every), ("both", every[::-1])):
        words = f"every row of {short(look)} is reversed" + (", and the order of the rows" if axis == "both" else "")
        yield from look.proposals(
            words,
            lambda some, order=order: look.tensor.decode_rows(order[some])[:, ::-1],
            lambda order=order: look.whole[order][:, ::-1],
            axis=axis,
        )


def shifted_columns(look: Look) -> Iterator[Candidate]:
    """Columns off by one."""
    for step in (1, -1):
        words = f"the columns of {short(look)} are shifted {'right' if step > 0 else 'left'} by one"
        yield from look.proposals(
            words,
            lambda some, step=step: np.roll(look.tensor.decode_rows(some), step, axis=1),
            lambda step=step: np.roll(look.whole, step, axis=1),
            axis="column",
            by=step,
        )


def folded(look: Look) -> Iterator[Candidate]:
    """A norm's weight multiplied into the matrix, or taken out of it."""
    layer, stage = look.node
    name = _NORM_BEFORE.get(stage)
    norm = look.evidence.tensor(name.format(layer)) if name is not None else None
    if norm is None:
        return
    weight = norm.decode().reshape(-1)
    inverse = np.divide(1, weight, out=np.zeros_like(weight), where=weight != 0)
    for factors, words in ((weight, "is multiplied into"), (inverse, "is divided out of")):
        yield from look.proposals(
            f"the norm's weight {words} {short(look)}, beside the norm's own multiplication",
            lambda some, factors=factors: look.tensor.decode_rows(some) * factors,
            lambda factors=factors: look.whole * factors,
            tensor=norm.name,
        )


_NORM_BEFORE = {
    Stage.QKV_MATMUL: "model.layers.{}.input_layernorm.weight",
    Stage.FFN_GATE: "model.layers.{}.post_attention_layernorm.weight",
    Stage.FFN_UP: "model.layers.{}.post_attention_layernorm.weight",
    Stage.LM_HEAD: "model.norm.weight",
}


def head_columns(look: Look) -> Iterator[Candidate]:
    """The columns of heads permuted, zeroed or scaled: what each head's inputs are multiplied by is fitted."""
    config = look.evidence.config
    size, count = config.head_dim, config.num_heads
    if look.node[1] is not Stage.ATTN_OUT or look.tensor.shape[1] != size * count or count > _MOST_HEADS:
        return
    mixed = _mixture(look, size, count)
    if mixed is None or np.allclose(mixed, np.eye(count), atol=WORTH):
        return
    order = np.abs(mixed).argmax(axis=1)
    factors = mixed[np.arange(count), order]
    moved = np.flatnonzero(order != np.arange(count))
    if moved.size and not np.allclose(factors, 1, atol=WORTH):
        return
    source = (order[:, None] * size + np.arange(size)).reshape(-1)
    # Exact numbers are what everyday accidents have: zero, a half.
    factors = np.where(np.isclose(factors, np.round(factors * 8) / 8, atol=1e-2), np.round(factors * 8) / 8, factors)
    every = np.repeat(factors, size).astype(np.float32)
    hurt = np.flatnonzero(factors != 1)
    if moved.size:
        named = ", ".join(f"{i} holds {order[i]}" for i in moved[:4].tolist())
        words, told = f"the heads' columns of {short(look)} are permuted ({named})", {"order": order.tolist()}
    else:
        named = ", ".join(f"{h} by {factors[h]:.4g}" for h in hurt[:4].tolist())
        words, told = f"the columns of {short(look)} are multiplied, head {named}", {"factors": factors.tolist()}
    yield from look.proposals(
        words,
        lambda some: look.tensor.decode_rows(some)[:, source] * every,
        lambda: look.whole[:, source] * every,
        axis="column",
        **told,
    )


def _mixture(look: Look, size: int, count: int) -> np.ndarray | None:
    """`[head of the inputs, head of the weights]`: how much of each product is in the found sums."""
    rows = look.sample(_OUTPUTS)
    x = look.activations(look.tensor.block_type) * look.weights[:, None]
    x = x.reshape(len(x), count, size)
    w = look.tensor.decode_rows(rows).astype(np.float64).reshape(rows.size, count, size)
    if len(x) * rows.size < 2 * count * count:
        return None
    terms = np.einsum("thc,okc->tohk", x, w, optimize=True).reshape(len(x) * rows.size, count * count)
    found = (look.found[:, rows] * look.weights[:, None]).reshape(-1)
    mixed, *_ = np.linalg.lstsq(terms, found, rcond=None)
    left = np.linalg.norm(found - terms @ mixed) / max(np.linalg.norm(found), 1e-300)
    return mixed.reshape(count, count) if left <= WORTH else None


def head_columns_permuted(look: Look) -> Iterator[Candidate]:
    """`head_columns` where they are moved."""
    yield from (c for c in head_columns(look) if "order" in c.parameters)


def head_columns_scaled(look: Look) -> Iterator[Candidate]:
    """`head_columns` where they are multiplied by a number that is not zero."""
    yield from (c for c in head_columns(look) if 0.0 not in c.parameters.get("factors", [0.0]))


def head_columns_zeroed(look: Look) -> Iterator[Candidate]:
    """`head_columns` where some are zero."""
    yield from (c for c in head_columns(look) if 0.0 in c.parameters.get("factors", []))


def another_tensor(look: Look) -> Iterator[Candidate]:
    """A tensor of the same shape that was read in this one's place, or exchanged with it."""
    rows = look.sample(_FIRST_ROWS)
    found: list[tuple[float, str, EncodedTensor]] = []
    for name, other in look.evidence.checkpoint.tensors.items():
        if name in (look.name, look.tensor.name) or tuple(other.shape) != tuple(look.tensor.shape):
            continue
        try:
            left = look.left(rows, other.decode_rows(rows), other.block_type)
        except CheckpointError:
            continue
        if left <= WORTH:
            found.append((left, name, other))
    for _, name, other in sorted(found, key=lambda item: item[0])[:2]:
        taken = {look.name: replace(other, name=look.name)}
        partner = _partner(look, name)
        if partner is not None:
            both: Mapping[str, EncodedTensor | np.ndarray] = {**taken, name: replace(look.tensor, name=name)}
            words = f"{short(look)} and {_place(look, name)} are exchanged"
            yield look.candidate(words, dict(both), frozenset({look.node, partner}), tensor=name, exchanged=True)
        yield look.candidate(
            f"{_place(look, name)} is multiplied in the place of {short(look)}",
            dict(taken),
            tensor=name,
            exchanged=False,
        )


def _place(look: Look, name: str) -> str:
    """The other tensor in words: with its layer where that is another."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    inside = name.startswith("model.layers.")
    layer = int(name.split(".")[2]) if inside else OUTSIDE
    return leaf if layer == look.node[0] else f"{leaf} of layer {layer}" if inside else leaf


def _partner(look: Look, name: str) -> Node | None:
    """The product of the other tensor, if it shows this one's values."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else OUTSIDE
    for stage, names in STAGE_TENSORS.items():
        if name not in (pattern.format(layer) for pattern in names):
            continue
        node = (layer, stage)
        if node == look.node:
            others = [other for other in looks(look.evidence, node) if other.name == name]
        else:
            others = list(_fresh(look, node, name))
        for other in others:
            rows = other.sample(_FIRST_ROWS)
            if other.left(rows, look.tensor.decode_rows(rows), look.tensor.block_type) <= WORTH:
                return node
    return None


def _fresh(look: Look, node: Node, name: str) -> Iterator[Look]:
    if look.evidence.value(node) is not None:
        yield from (other for other in looks_afresh(look.evidence, node) if other.name == name)
