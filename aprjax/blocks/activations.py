"""Q8_1 and Q8_K hold activations, never weights (ggml-common.h `block_q8_1`, `block_q8_K`).

Q8_1   36 bytes /  32: 0-1 d  2-3 s = float16(d * sum q)  4-35 int8
Q8_K  292 bytes / 256: 0-3 d (float32)  4-259 int8  260-291 int16 sums of 16
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.blocks.fields import Fields, half, reinterpret


def unpack_q8_1(blocks: Any) -> Fields:
    """Q8_1: q * d; `s` only serves the dot."""
    return Fields(reinterpret(blocks[..., 4:36], np.int8)[..., None, :], half(blocks[..., 0:2]))


def unpack_q8_k(blocks: Any) -> Fields:
    """Q8_K: q * d; the sums only serve the dot."""
    return Fields(
        reinterpret(blocks[..., 4:260], np.int8)[..., None, :], reinterpret(blocks[..., 0:4], np.float32)[..., 0]
    )
