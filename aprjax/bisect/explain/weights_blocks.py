"""Accidents of encoded bytes: nibbles, high bits, scales, another block type, a wrong offset, one passage too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from aprjax.bisect.explain.hypothesis import Candidate
from aprjax.bisect.explain.weights_look import WORTH, Look, as_encoded, encoded
from aprjax.bisect.explain.weights_rows import short
from aprjax.bisect.explanations.block_fields import CHANGES
from aprjax.blocks import FORMATS, block_format, byte_size
from aprjax.checkpoint.types import EncodedTensor

# Bytes that a wrong offset is off by: any small number, else whole blocks or alignments.
_OFFSETS = (*range(1, 65), 96, 128, 144, 176, 192, 210, 256, 512, 1024, 4096)
_FEW = 4


def changed_fields(slug: str) -> Callable[[Look], Iterator[Candidate]]:
    """The blocks after one of `files`' accidents of packing or unpacking."""

    def test(look: Look) -> Iterator[Candidate]:
        if not look.per_row:
            return
        rows = look.sample()
        size = block_format(look.tensor.block_type).block_bytes
        for words, change in CHANGES[slug](look.tensor.block_type):
            some = np.ascontiguousarray(look.tensor.packed()[rows]).reshape(-1, size).copy()
            change(some)
            values = _decoded(look, some, rows.size)
            if look.left(rows, values, look.tensor.block_type) > WORTH:
                continue
            whole = look.tensor.data.reshape(-1, size).copy()
            change(whole)
            tensor = replace(look.tensor, data=whole.reshape(-1))
            yield look.candidate(f"{short(look)}: {words}", {look.name: tensor}, type=look.tensor.block_type)

    return test


def _decoded(look: Look, blocks: np.ndarray, rows: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = block_format(look.tensor.block_type).decode(blocks).reshape(rows, -1)
    return values[:, : look.tensor.shape[1]]


def misread(look: Look) -> Iterator[Candidate]:
    """The same bytes decoded as another type."""
    own, rows = look.tensor, look.sample()
    if own.row_padded or not look.per_row:
        return
    for blocks in FORMATS.values():
        if blocks.name == own.block_type or blocks.flat or blocks.tensor_scale or own.shape[1] % blocks.block_size:
            continue
        size = byte_size(blocks.name, own.shape)
        # Where the other type is shorter the rest is not read; where it is longer, it would be the next tensor's.
        if size > own.data.size:
            continue
        tensor = replace(own, block_type=blocks.name, data=own.data[:size])
        yield from _as_other(look, tensor, rows)


def _as_other(look: Look, tensor: EncodedTensor, rows: np.ndarray) -> Iterator[Candidate]:
    with np.errstate(all="ignore"):
        values = tensor.decode_rows(rows)
    words = f"the {look.tensor.block_type} bytes of {short(look)} are read as {tensor.block_type}"
    told = {"read_as": tensor.block_type, "type": look.tensor.block_type}
    as_encoded_type = look.left(rows, values, tensor.block_type)
    as_floats = look.left(rows, values, "F32")
    if min(as_encoded_type, as_floats) > WORTH:
        return
    if as_encoded_type <= as_floats:
        yield look.candidate(words, {look.name: tensor}, **told)
    else:
        yield look.candidate(f"{words}, and kept as floats", {look.name: tensor.decode()}, **told)


def byte_order(look: Look) -> Iterator[Candidate]:
    """Floats with their bytes reversed."""
    width = block_format(look.tensor.block_type).block_bytes
    if block_format(look.tensor.block_type).quantized or width == 1:
        return
    tensor = replace(look.tensor, data=look.tensor.data.reshape(-1, width)[:, ::-1].reshape(-1))
    rows = look.sample()
    with np.errstate(all="ignore"):
        left = look.left(rows, tensor.decode_rows(rows), tensor.block_type)
    if left <= WORTH:
        yield look.candidate(f"the values of {short(look)} are read with their bytes reversed", {look.name: tensor})


def moved_bytes(look: Look) -> Iterator[Candidate]:
    """The bytes from some way before or behind the tensor's own offset; what comes round stands for its neighbour."""
    if not look.per_row:
        return
    rows = look.sample(_FEW)
    rows = rows[(rows > 0) & (rows < look.tensor.shape[0] - 1)]
    if not rows.size:
        return
    for by in (sign * offset for offset in _OFFSETS for sign in (1, -1)):
        values = _at_offset(look, rows, by)
        if values is None or look.left(rows, values, look.tensor.block_type) > WORTH:
            continue
        data = np.zeros_like(look.tensor.data)
        if by > 0:
            data[:-by] = look.tensor.data[by:]
        else:
            data[-by:] = look.tensor.data[:by]
        words = (
            f"the bytes of {short(look)} are read from {abs(by)} bytes {'behind' if by > 0 else 'before'} their place"
        )
        yield look.candidate(words, {look.name: replace(look.tensor, data=data)}, by=by)


def _at_offset(look: Look, rows: np.ndarray, by: int) -> np.ndarray | None:
    size = look.tensor.data.size // look.tensor.shape[0]
    blocks = block_format(look.tensor.block_type)
    starts = rows * size + by
    if starts.min() < 0 or starts.max() + size > look.tensor.data.size:
        return None
    data = np.stack([look.tensor.data[start : start + size] for start in starts.tolist()])
    return _decoded(look, data.reshape(-1, blocks.block_bytes), rows.size)


def twice_encoded(look: Look) -> Iterator[Candidate]:
    """The values after a passage through another block type."""
    own, rows = block_format(look.tensor.block_type), look.sample(_FEW)
    width = look.tensor.shape[1]
    if not look.per_row or look.tensor.row_padded:
        return
    values = look.tensor.decode_rows(rows)
    known = look.left(rows, values, own.name)
    for through in FORMATS.values():
        if through.encode is None or through.name == "F32" or width % through.block_size or through.flat:
            continue
        passed = encoded(values, through.name)
        told = {"through": through.name, "type": own.name}
        words = f"the {own.name} values of {short(look)} went through {through.name}"
        again = own.encode is not None and own.quantized and not own.flat
        tries = [(passed, through.name, "")]
        if again and through.name != own.name:
            tries.insert(0, (encoded(passed, own.name), own.name, f" and back to {own.name}"))
        for predicted, kind, tail in tries:
            # Every such passage leaves little: only the one that leaves a tenth of what no passage does is it.
            if look.left(rows, predicted, kind) > known / 10:
                continue
            whole = encoded(look.whole, through.name) if tail else look.whole
            tensor = as_encoded(replace(look.tensor, block_type=kind, data=_nothing(kind, look.tensor.shape)), whole)
            yield look.candidate(words + tail, {look.name: tensor}, **told)


def _nothing(block_type: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(byte_size(block_type, shape), np.uint8)
