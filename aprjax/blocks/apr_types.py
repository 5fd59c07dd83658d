"""AprQ4 and AprQ8, the two types that only the `.apr` container has (apr-format.md section 5.3).

    AprQ4  18 bytes / 32 values: 0-1 float16 scale, 2-17 nibbles; value 2i is the *low* nibble of byte i and
           value 2i+1 its high nibble (ggml's Q4_0 puts elements i and 16+i there). x = (q - 8) * scale.
    AprQ8  float32 scale of the whole tensor, then one int8 per value. x = q * scale.

Both run flat over the tensor: a block does not know where a row ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.blocks.encoders import round_half_away
from aprjax.blocks.fields import Fields, half, namespace, reinterpret


def unpack_apr_q4(blocks: Any) -> Fields:
    """AprQ4: (q - 8) * scale."""
    xp = namespace(blocks)
    qs = blocks[..., 2:18]
    codes = xp.stack([qs & 15, qs >> 4], axis=-1).reshape(*qs.shape[:-1], 1, 32)
    return Fields(codes.astype(np.int8) - np.int8(8), half(blocks[..., 0:2]))


def decode_apr_q8(blocks: Any) -> Any:
    """The codes as float32; the caller multiplies by the tensor's scale."""
    return reinterpret(blocks, np.int8).astype(np.float32)


def encode_apr_q4(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 18]` (aprender `AF:v2/writer.rs`, `add_q4`).

    The codes come from the unrounded float32 scale, max|x|/7 (1 for an all-zero block); what is
    stored is its float16 rounding.
    """
    values = np.ascontiguousarray(values, np.float32)
    largest = np.abs(values).max(axis=1)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(7))
    codes = (np.clip(round_half_away(values / scale[:, None]), -8, 7) + 8).astype(np.uint8)
    with np.errstate(over="ignore"):
        head = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([head, codes[:, 0::2] | (codes[:, 1::2] << 4)], axis=1)


def apr_q8_scale(values: np.ndarray) -> np.float32:
    """max|x| / 127 over the whole tensor; 1 for a zero tensor, so that decoding stays finite."""
    largest = np.float32(np.abs(values).max(initial=0))
    return np.float32(1) if largest == 0 else largest / np.float32(127)


def encode_apr_q8(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """float32 `[n, 1]` -> `uint8[n, 1]` with the tensor's scale; ties away from zero."""
    return np.clip(round_half_away(values / scale), -127, 127).astype(np.int8).view(np.uint8)
