"""Unquantized types: F32, F16, BF16, F64 and the integer containers I8 … I64.

Little-endian, one element per "block". All widen to float32 exactly except F64, I32 and I64, which
round to nearest even (they never hold weights; GGUF and APR merely allow them).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.blocks.fields import reinterpret


def decoder(dtype: type) -> Any:
    """A decoder of plain `dtype` elements, for NumPy and JAX alike."""

    def decode(blocks: Any) -> Any:
        return reinterpret(blocks, dtype).astype(np.float32)

    return decode


def decode_bf16(blocks: Any) -> Any:
    """bfloat16 is the upper half of a float32: a shift, so subnormals and NaN payloads survive."""
    return reinterpret(reinterpret(blocks, np.uint16).astype(np.uint32) << np.uint32(16), np.float32)


def encode_f32(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 1]` -> `uint8[n, 4]`."""
    return np.ascontiguousarray(values, "<f4").view(np.uint8)


def encode_f16(values: np.ndarray) -> np.ndarray:
    """IEEE round to nearest even, overflow to infinity (ggml `ggml_fp32_to_fp16_row`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def encode_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN is made quiet, subnormals are kept (ggml `ggml_compute_fp32_to_bf16`)."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (words + (np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (words >> np.uint32(16)) | np.uint32(64)
    is_nan = (words & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).astype("<u2").view(np.uint8)
