"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (ggml-common.h `block_q4_0` … `block_q8_0`): 32 elements, one scale.

    type  bytes  0-1  2-3  then
    Q4_0   18    d    qs[16]
    Q4_1   20    d    m    qs[16]
    Q5_0   22    d    qh[4] qs[16]
    Q5_1   24    d    m    qh[4] qs[16]
    Q8_0   34    d    int8[32]

`qs`: element i < 16 is the low nibble of qs[i], element 16+i its high nibble. `qh` is a little-endian
word whose bit e is the fifth bit of element e.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.blocks.fields import Fields, bits, half, namespace, reinterpret


def _nibbles(qs: Any) -> Any:
    return bits(qs, [0, 4], 15).reshape(*qs.shape[:-1], 1, 32)


def _fifth_bits(qh: Any) -> Any:
    xp = namespace(qh)
    spread = (qh[..., :, None] >> xp.arange(8, dtype=np.uint8)) & np.uint8(1)
    return (spread << np.uint8(4)).reshape(*qh.shape[:-1], 1, 32)


def _signed(codes: Any, offset: int) -> Any:
    return codes.astype(np.int8) - np.int8(offset)


def unpack_q4_0(blocks: Any) -> Fields:
    """Q4_0: (q - 8) * d."""
    return Fields(_signed(_nibbles(blocks[..., 2:18]), 8), half(blocks[..., 0:2]))


def unpack_q4_1(blocks: Any) -> Fields:
    """Q4_1: q * d + m."""
    codes = _nibbles(blocks[..., 4:20]).astype(np.int8)
    return Fields(codes, half(blocks[..., 0:2]), minimum=-half(blocks[..., 2:4]))


def unpack_q5_0(blocks: Any) -> Fields:
    """Q5_0: (q - 16) * d."""
    codes = _nibbles(blocks[..., 6:22]) | _fifth_bits(blocks[..., 2:6])
    return Fields(_signed(codes, 16), half(blocks[..., 0:2]))


def unpack_q5_1(blocks: Any) -> Fields:
    """Q5_1: q * d + m."""
    codes = (_nibbles(blocks[..., 8:24]) | _fifth_bits(blocks[..., 4:8])).astype(np.int8)
    return Fields(codes, half(blocks[..., 0:2]), minimum=-half(blocks[..., 2:4]))


def unpack_q8_0(blocks: Any) -> Fields:
    """Q8_0: q * d."""
    codes = reinterpret(blocks[..., 2:34], np.int8)
    return Fields(codes[..., None, :], half(blocks[..., 0:2]))
