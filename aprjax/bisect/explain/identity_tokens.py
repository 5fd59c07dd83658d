"""Which tokens a trace was made of, read from its embedding rows, against those it is said to be made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprjax.bisect.replay.judge import row_distances
from aprjax.blocks import block_format
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor

# Rows of the vocabulary decoded at a time: 32 MiB of float32 at a width of 2048.
_CHUNK = 4096
# Nearest rows of the vocabulary kept for each row of the dump: rows that were never trained can be equal.
_KEPT = 8
# A row is a token's when it is nearer to it than half its own length: through half precision it is off by some 1e-3,
# and the rows of unrelated tokens by the root of two.
_SAME = 0.5
# Ties named.
_MOST_TIES = 4


@dataclass(frozen=True)
class RecoveredTokens:
    """The tokens whose embedding rows a trace holds.

    Attributes:
        ids: by row; None where no row of the vocabulary is near.
        distance: relative L2 of the row that is farthest from its token's.
        exact: whether every row is its token's, bit for bit.
        ties: by token id, others whose rows are equal.
        source: what they were read from, in words.
    """

    ids: tuple[int | None, ...]
    distance: float
    exact: bool
    ties: dict[int, tuple[int, ...]]
    source: str

    @property
    def known(self) -> tuple[int, ...] | None:
        """The ids, if every row is a token's."""
        return tuple(i for i in self.ids if i is not None) if self.ids and None not in self.ids else None


def rows_are(rows: np.ndarray, tokens: tuple[int, ...], checkpoint: Checkpoint) -> bool:
    """Whether rows `[position, hidden]` are the embedding's of these tokens: what sound traces are asked first."""
    size = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    if len(rows) != len(tokens) or any(not 0 <= token < size for token in tokens):
        return False
    from aprjax.qwen2.loading import embed

    # A sound dump is equal to the bit, or to the rounding of a half-precision one: far below what two tokens differ by.
    # Its length may be another, which is no matter of tokens.
    ours, theirs = _directions(rows), _directions(embed(checkpoint, list(tokens)))
    return bool((row_distances(ours, theirs) <= _SAME / 8).all())


def recover_tokens(
    rows: np.ndarray, checkpoint: Checkpoint, *, norm_weight: np.ndarray | None = None
) -> RecoveredTokens:
    """Finds every row's token in the embedding matrix, which is decoded a piece at a time.

    Args:
        rows: `float32[position, hidden]`: the embedding stage's, or layer 0's attn_norm with its weight.
        checkpoint: with the embedding.
        norm_weight: of layer 0's first norm, where the rows have been through it: then directions are compared, and
            epsilon does not matter.
    """
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    wanted = distinct.astype(np.float32)
    if norm_weight is not None:
        wanted = _directions(np.divide(wanted, norm_weight, out=np.zeros_like(wanted), where=norm_weight != 0))
    near = np.full((len(wanted), 0), 0, np.int64)
    far = np.full((len(wanted), 0), 0.0, np.float32)
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    for start, decoded in _pieces(tensor):
        values = decoded if norm_weight is None else _directions(decoded)
        # |a - b|^2 without |a|^2, which is the same for all.
        squared = np.einsum("ij,ij->i", values, values)[None] - 2 * wanted @ values.T
        squared = np.where(np.isnan(squared), np.inf, squared)
        best = np.argpartition(squared, min(_KEPT, squared.shape[1]) - 1, axis=1)[:, :_KEPT]
        far = np.concatenate([far, np.take_along_axis(squared, best, axis=1)], axis=1)
        near = np.concatenate([near, best + start], axis=1)
        keep = np.argsort(far, axis=1, kind="stable")[:, :_KEPT]
        far, near = np.take_along_axis(far, keep, axis=1), np.take_along_axis(near, keep, axis=1)
    ids, distances, ties = [], [], {}
    for row, candidates in zip(wanted, near, strict=True):
        token, distance, equal = _nearest(row, np.sort(candidates), checkpoint, norm_weight is not None)
        ids.append(token if distance <= _SAME else None)
        distances.append(distance)
        if len(equal) > 1 and distance <= _SAME:
            ties[token] = equal[1 : 1 + _MOST_TIES]
    by_row = [ids[i] for i in inverse.reshape(-1)]
    source = "the embedding's rows" if norm_weight is None else "the directions of layer 0's attn_norm"
    return RecoveredTokens(tuple(by_row), max(distances, default=0.0), not any(distances), ties, source)


def _pieces(tensor: EncodedTensor) -> Iterator[tuple[int, np.ndarray]]:
    """`(first row, rows)` of a matrix; those whose rows begin inside blocks are decoded whole."""
    try:
        whole = tensor.decode() if block_format(tensor.block_type).flat else None
        if whole is None:
            tensor.packed()
    except CheckpointError:
        whole = tensor.decode()
    for start in range(0, tensor.shape[0], _CHUNK):
        part = slice(start, min(start + _CHUNK, tensor.shape[0]))
        yield start, tensor.decode_rows(part) if whole is None else whole[part]


def _nearest(
    row: np.ndarray, candidates: np.ndarray, checkpoint: Checkpoint, directions: bool
) -> tuple[int, float, tuple[int, ...]]:
    """The nearest of a few tokens, how far it is, and all that are as near: the smallest id first."""
    from aprjax.qwen2.loading import embed

    values = embed(checkpoint, candidates)
    if directions:
        values = _directions(values)
    distances = row_distances(np.broadcast_to(row, values.shape), values)
    distances = np.where(np.isnan(distances), np.inf, distances)
    least = float(distances.min())
    equal = tuple(int(i) for i in candidates[distances == least])
    return equal[0], least, equal


def _directions(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, np.float32(1))
