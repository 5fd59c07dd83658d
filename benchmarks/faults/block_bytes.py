"""Faults of the fields of a block, byte by byte (layouts: ggml-common.h; kernels.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from codec import FLOAT_TYPES, decode, encode
from container import PlantError, Tensor

BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
# First byte of every float16 that scales a block's values, or is subtracted from them in proportion.
_FACTORS = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# The bytes that hold two four-bit codes each, and how many elements those of one byte are apart.
_NIBBLES = {
    "Q4_0": (2, 18, 16),
    "Q5_0": (6, 22, 16),
    "Q4_K": (16, 144, 32),
    "Q5_K": (48, 176, 32),
    "Q6_K": (0, 128, 64),
}
_HIGH_BITS = {"Q5_0": (2, 6), "Q5_K": (16, 48), "Q6_K": (128, 192)}


def blocks_of(tensor: Tensor) -> np.ndarray:
    """`uint8[blocks, bytes]`, writable."""
    size = BLOCK_BYTES.get(tensor.type_name)
    if size is None:
        raise PlantError(f"{tensor.name} is {tensor.type_name}, which has no blocks")
    return np.frombuffer(bytearray(tensor.whole()), np.uint8).reshape(-1, size)


def by_blocks(change: Callable[[np.ndarray, str], None]) -> Callable[[Tensor], Tensor]:
    """A fault of every block."""

    def apply(tensor: Tensor) -> Tensor:
        blocks = blocks_of(tensor)
        change(blocks, tensor.type_name)
        return tensor.with_bytes(blocks.tobytes())

    return apply


def _known(table: dict[str, tuple[int, ...]], kind: str, what: str) -> tuple[int, ...]:
    if kind not in table:
        raise PlantError(f"{kind} has no {what}")
    return table[kind]


def interleave_nibbles(blocks: np.ndarray, kind: str) -> None:
    """Elements 2i and 2i + 1 share a byte."""
    first, end, apart = _known(_NIBBLES, kind, "nibbles")
    for start in range(first, end, apart):
        part = blocks[:, start : start + apart].copy()
        for i in range(apart):
            low, high = (part[:, j % apart] >> (4 * (j // apart)) & 15 for j in (2 * i, 2 * i + 1))
            blocks[:, start + i] = low + 16 * high


def exchange_nibbles(blocks: np.ndarray, kind: str) -> None:
    """The two codes of every byte have changed places."""
    first, end, _ = _known(_NIBBLES, kind, "nibbles")
    blocks[:, first:end] = blocks[:, first:end] // 16 + blocks[:, first:end] % 16 * 16


def drop_high_bits(blocks: np.ndarray, kind: str) -> None:
    """The fifth, or fifth and sixth, bits of the codes are zero."""
    first, end = _known(_HIGH_BITS, kind, "high bits")
    blocks[:, first:end] = 0


def drop_scale_bits(blocks: np.ndarray, kind: str) -> None:
    """The high two bits of scales and minimums 4 to 7 are lost."""
    if kind not in ("Q4_K", "Q5_K"):
        raise PlantError(f"{kind} has no six-bit scales in twelve bytes")
    blocks[:, 4:12] %= 64


def lose_minimum(blocks: np.ndarray, kind: str) -> None:
    """The block's minimum is zero."""
    if kind not in ("Q4_K", "Q5_K"):
        raise PlantError(f"{kind} has no minimum")
    blocks[:, 2:4] = 0


def exchange_minimum(blocks: np.ndarray, kind: str) -> None:
    """Scale and minimum have changed places."""
    if kind not in ("Q4_K", "Q5_K"):
        raise PlantError(f"{kind} has no minimum")
    blocks[:, :4] = blocks[:, [2, 3, 0, 1]]


def scaled(tensor: Tensor, factor: float, rows: slice = slice(None)) -> Tensor:
    """Values times a factor: of blocks, their float16 factors; floats one by one."""
    kind = tensor.type_name
    if kind not in BLOCK_BYTES:
        values = decode(tensor)
        values[rows] = values[rows] * np.float32(factor)
        return tensor.with_bytes(encode(values, kind))
    blocks = blocks_of(tensor)
    of_rows = blocks.reshape(tensor.shape[0], -1, blocks.shape[1])
    for place in _FACTORS[kind]:
        old = np.ascontiguousarray(of_rows[rows, :, place : place + 2]).view("<f2").astype(np.float32)
        of_rows[rows, :, place : place + 2] = (old * np.float32(factor)).astype("<f2").view(np.uint8)
    return tensor.with_bytes(blocks.tobytes())


def with_nan(tensor: Tensor) -> Tensor:
    """One NaN in the middle: a value, or a block's scale."""
    kind = tensor.type_name
    if kind in FLOAT_TYPES:
        values = np.frombuffer(bytearray(tensor.whole()), FLOAT_TYPES[kind])
        values[values.size // 2] = np.nan
        return tensor.with_bytes(values.tobytes())
    blocks = blocks_of(tensor)
    place = _FACTORS[kind][0]
    blocks[len(blocks) // 2, place : place + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    return tensor.with_bytes(blocks.tobytes())
