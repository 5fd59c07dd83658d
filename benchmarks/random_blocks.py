"""Random blocks of ggml's types: every one is valid, and the decoded values have mean zero and a given size.

Codes are uniform random bits, which is what costs nothing to make: quantized weights are bell-shaped. Group scales are
drawn from the upper half of their range, as ggml's quantizers leave them, and minimums are set so that a group's values
lie around zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Standard deviation of a uniform integer of so many bits: sqrt((4^bits - 1) / 12).
SPREAD = {bits: ((4**bits - 1) / 12) ** 0.5 for bits in (4, 5, 6, 8)}
# Six bits, upper half: sqrt of the mean square of 32 … 63. Q6_K's group scales are int8, of either sign: 64 … 127.
SIX_BITS = float(np.sqrt(np.mean(np.arange(32.0, 64.0) ** 2)))
EIGHT_BITS = float(np.sqrt(np.mean(np.arange(64.0, 128.0) ** 2)))
# Block scales vary by that much around their mean, so that no two blocks are alike in it.
JITTER = 0.1

Blocks = np.ndarray
Generator = np.random.Generator


def _bytes(generator: Generator, blocks: int, width: int) -> Blocks:
    return np.frombuffer(generator.bytes(blocks * width), np.uint8).reshape(blocks, width).copy()


def _scales(generator: Generator, blocks: int, size: float, *, signed: bool) -> np.ndarray:
    """One float16 per block: about `size`, of either sign if `signed`."""
    # The second moment of 1 + JITTER * normal is 1 + JITTER^2.
    values = size / np.sqrt(1 + JITTER**2) * (1 + JITTER * generator.standard_normal(blocks, np.float32))
    if signed:
        values *= generator.integers(0, 2, blocks) * 2.0 - 1.0
    return values.astype("<f2")


def _k_quant(generator: Generator, blocks: int, rms: float, *, bits: int, width: int) -> Blocks:
    """Q4_K and Q5_K: d, dmin, eight scales and minimums of six bits in twelve bytes, codes."""
    made = _bytes(generator, blocks, width)
    d = _scales(generator, blocks, rms / (SPREAD[bits] * SIX_BITS), signed=False)
    made[:, 0:2] = d[:, None].view(np.uint8)
    # The middle of the codes is taken off: minimums equal scales, and dmin is d times that middle.
    made[:, 2:4] = (d.astype(np.float32) * (2**bits - 1) / 2).astype("<f2")[:, None].view(np.uint8)
    groups = generator.integers(32, 64, (blocks, 8), np.uint8)
    low, high = groups[:, :4], groups[:, 4:]
    made[:, 4:8] = made[:, 8:12] = low | (high >> 4 << 6)
    made[:, 12:16] = (high & 15) | (high << 4)
    return made


def q4_k(generator: Generator, blocks: int, rms: float) -> Blocks:
    """`uint8[blocks, 144]`."""
    return _k_quant(generator, blocks, rms, bits=4, width=144)


def q5_k(generator: Generator, blocks: int, rms: float) -> Blocks:
    """`uint8[blocks, 176]`."""
    return _k_quant(generator, blocks, rms, bits=5, width=176)


def q6_k(generator: Generator, blocks: int, rms: float) -> Blocks:
    """`uint8[blocks, 210]`."""
    made = _bytes(generator, blocks, 210)
    # Either sign: codes are -32 … 31, whose mean of -1/2 would otherwise stay.
    magnitudes = made[:, 192:208]
    made[:, 192:208] = np.where(magnitudes & 128, -(64 + (magnitudes & 63)), 64 + (magnitudes & 63)).astype(np.uint8)
    d = _scales(generator, blocks, rms / (SPREAD[6] * EIGHT_BITS), signed=False)
    made[:, 208:210] = d[:, None].view(np.uint8)
    return made


def q5_0(generator: Generator, blocks: int, rms: float) -> Blocks:
    """`uint8[blocks, 22]`."""
    made = _bytes(generator, blocks, 22)
    made[:, 0:2] = _scales(generator, blocks, rms / SPREAD[5], signed=True)[:, None].view(np.uint8)
    return made


def q8_0(generator: Generator, blocks: int, rms: float) -> Blocks:
    """`uint8[blocks, 34]`."""
    made = _bytes(generator, blocks, 34)
    made[:, 0:2] = _scales(generator, blocks, rms / SPREAD[8], signed=True)[:, None].view(np.uint8)
    return made


RANDOM_BLOCKS: dict[str, Callable[[Generator, int, float], Blocks]] = {
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "Q5_0": q5_0,
    "Q8_0": q8_0,
}
