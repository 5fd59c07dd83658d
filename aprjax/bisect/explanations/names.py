"""Another tensor's values under this name: gate for up, key for value, one layer for another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.pair import Pair, Values, distance
from aprjax.blocks import block_format, dequantize
from aprjax.checkpoint.types import EncodedTensor

# Unrelated rows are sqrt(2) apart.
_WORTH_VERIFYING = 0.7
_ROWS, _COLUMNS = 4, 256


def _other_name(pair: Pair) -> Iterator[Candidate]:
    ours = pair.ours
    known = None
    for name, other in pair.ref.tensors.items():
        if name == pair.name or other.shape != ours.shape:
            continue
        same_type = other.block_type == ours.block_type and other.row_padded == ours.row_padded
        # Of several that hold the same (norms of one value, biases of zero), none can be told to be the one.
        if same_type and bytes(other.data[:64]) == bytes(ours.data[:64]) and np.array_equal(other.data, ours.data):
            yield Candidate(_words(name), 0.0, "all bytes", _parameters(pair, name))
            return
        if known is None:
            known = _corner(ours)
        left = distance(known, _corner(other))
        if left > _WORTH_VERIFYING:
            continue
        values = Values(other)
        residual, basis = pair.residual(values.rows)
        yield Candidate(_words(name), residual, basis, _parameters(pair, name), predict=values.rows)
        if residual == 0.0:
            return


def _words(name: str) -> str:
    return f"the model holds the reference's {name} under this name"


def _parameters(pair: Pair, name: str) -> dict[str, object]:
    """The other's name, and whether the two have changed places."""
    ours, theirs = pair.model.tensors.get(name), pair.theirs
    exchanged = ours is not None and ours.shape == theirs.shape and distance(_corner(ours), _corner(theirs)) == 0.0
    return {"tensor": name, "exchanged": exchanged}


def _corner(tensor: EncodedTensor) -> np.ndarray:
    """The first elements of a few rows, without decoding more blocks than those."""
    values = Values(tensor)
    if not values.addressable:
        # Blocks run on over row ends, and the first ones hold the first elements wherever that is.
        blocks = block_format(tensor.block_type)
        count = -(-min(_COLUMNS, tensor.size) // blocks.block_size)
        head = tensor.data[: blocks.header_bytes + count * blocks.block_bytes]

        return dequantize(tensor.block_type, head, (count * blocks.block_size,))[: min(_COLUMNS, tensor.size)]
    return first_columns(tensor, np.linspace(0, tensor.shape[0] - 1, _ROWS).astype(np.int64), _COLUMNS).ravel()


def first_columns(tensor: EncodedTensor, rows: np.ndarray | slice, columns: int) -> np.ndarray:
    """float32 `[rows, columns]` of a tensor whose rows begin with a block."""
    blocks = block_format(tensor.block_type)
    width = tensor.size // tensor.shape[0]
    packed = np.ascontiguousarray(tensor.packed()[rows][:, : -(-columns // blocks.block_size)])
    values = blocks.decode(packed.reshape(-1, blocks.block_bytes)).reshape(len(packed), -1)
    return values[:, : min(columns, width)]


HYPOTHESES = (
    Hypothesis(
        "another-tensor",
        _other_name,
        "correct the converter's table of tensor names, and convert the model again from the reference",
    ),
)
