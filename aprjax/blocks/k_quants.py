"""Q2_K … Q6_K (ggml-common.h `block_q2_K` …): super-blocks of 256 with integer scales per group.

    Q2_K   84   0-15 scales (low nibble scale, high nibble minimum, 16 groups)  16-79 qs  80-81 d  82-83 dmin
    Q3_K  110   0-31 hmask  32-95 qs  96-107 scales (16 of 6 bits)  108-109 d
    Q4_K  144   0-1 d  2-3 dmin  4-15 scales  16-143 qs
    Q5_K  176   0-1 d  2-3 dmin  4-15 scales  16-47 qh  48-175 qs
    Q6_K  210   0-127 ql  128-191 qh  192-207 scales (int8, 16 groups)  208-209 d

Q4_K and Q5_K have 8 groups of 32. Element e: nibble of qs[32*(e>>6) + (e&31)], low if (e&63) < 32;
Q5_K's fifth bit is bit (e>>5) of qh[e&31]. The 12 bytes b hold 8 scales and 8 minimums of 6 bits:

    s < 4:   scale = b[s] & 63                        minimum = b[s+4] & 63
    s >= 4:  scale = b[s+4] & 15 | (b[s-4]>>6) << 4   minimum = b[s+4] >> 4 | (b[s]>>6) << 4

Q2_K, Q3_K and Q6_K have 16 groups of 16. With h = e>>7, g = (e>>5)&3, l = e&31: the two bits at 2g of
qs[32h+l] (Q2_K, Q3_K) or of qh[32h+l] (Q6_K: the upper two bits; the lower four are a nibble of
ql[64h + 32*(g&1) + l], low if g < 2). Q3_K subtracts 4 where bit 4h+g of hmask[l] is clear; its scale s
is nibble s>>3 of b[s&7] plus two bits at 2*(s>>2) of b[8 + (s&3)] as bits 4-5, minus 32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.blocks.fields import Fields, bits, half, namespace, reinterpret

_EIGHT = list(range(8))
_PAIRS = [0, 2, 4, 6]


def _scales_and_minimums(data: Any) -> tuple[Any, Any]:
    """The 6-bit scales and minimums of Q4_K/Q5_K: `uint8[..., 12]` -> two of `uint8[..., 8]`."""
    xp = namespace(data)
    first, second, third = data[..., 0:4], data[..., 4:8], data[..., 8:12]
    scales = xp.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    minimums = xp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales, minimums


def _nibble_groups(qs: Any) -> Any:
    """`uint8[..., 128]` -> `uint8[..., 8, 32]` in element order."""
    chunks = qs.reshape(*qs.shape[:-1], 4, 32)
    return bits(chunks, [0, 4], 15).reshape(*qs.shape[:-1], 8, 32)


def _two_bit_groups(qs: Any) -> Any:
    """`uint8[..., 64]` -> `uint8[..., 16, 16]` in element order."""
    halves = qs.reshape(*qs.shape[:-1], 2, 32)
    return bits(halves, _PAIRS, 3).reshape(*qs.shape[:-1], 16, 16)


def unpack_q2_k(blocks: Any) -> Fields:
    """Q2_K: d * scale * q - dmin * minimum."""
    packed = blocks[..., 0:16]
    return Fields(
        _two_bit_groups(blocks[..., 16:80]).astype(np.int8),
        half(blocks[..., 80:82]),
        packed & 15,
        half(blocks[..., 82:84]),
        packed >> 4,
    )


def unpack_q3_k(blocks: Any) -> Fields:
    """Q3_K: d * (scale - 32) * (q - 4 or 0)."""
    high = bits(blocks[..., 0:32], _EIGHT, 1).reshape(*blocks.shape[:-1], 16, 16)
    codes = (_two_bit_groups(blocks[..., 32:96]) | (high << 2)).astype(np.int8) - np.int8(4)
    lower = bits(blocks[..., 96:104], [0, 4], 15).reshape(*blocks.shape[:-1], 16)
    upper = bits(blocks[..., 104:108], _PAIRS, 3).reshape(*blocks.shape[:-1], 16)
    scales = (lower | (upper << 4)).astype(np.int8) - np.int8(32)
    return Fields(codes, half(blocks[..., 108:110]), scales)


def unpack_q4_k(blocks: Any) -> Fields:
    """Q4_K: d * scale * q - dmin * minimum."""
    scales, minimums = _scales_and_minimums(blocks[..., 4:16])
    codes = _nibble_groups(blocks[..., 16:144]).astype(np.int8)
    return Fields(codes, half(blocks[..., 0:2]), scales, half(blocks[..., 2:4]), minimums)


def unpack_q5_k(blocks: Any) -> Fields:
    """Q5_K: d * scale * q - dmin * minimum."""
    scales, minimums = _scales_and_minimums(blocks[..., 4:16])
    high = bits(blocks[..., 16:48], _EIGHT, 1)
    codes = (_nibble_groups(blocks[..., 48:176]) | (high << 4)).astype(np.int8)
    return Fields(codes, half(blocks[..., 0:2]), scales, half(blocks[..., 2:4]), minimums)


def unpack_q6_k(blocks: Any) -> Fields:
    """Q6_K: d * scale * (q - 32)."""
    lead = blocks.shape[:-1]
    lower = bits(blocks[..., 0:128].reshape(*lead, 2, 64), [0, 4], 15).reshape(*lead, 16, 16)
    upper = bits(blocks[..., 128:192].reshape(*lead, 2, 32), _PAIRS, 3).reshape(*lead, 16, 16)
    codes = (lower | (upper << 4)).astype(np.int8) - np.int8(32)
    return Fields(codes, half(blocks[..., 208:210]), reinterpret(blocks[..., 192:208], np.int8))
