"""Activations as an engine may round them before a product, in NumPy: no program to compile for each way."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from aprjax.bisect.explain.nodes import rounded
from aprjax.bisect.explain.variant import Activations
from aprjax.blocks import block_format
from aprjax.blocks.activations import QUANTIZERS
from aprjax.qwen2.realizar import ACTIVATION_BLOCKS


def partner_of(kind: Activations, block_type: str, columns: int) -> str | int | None:
    """What activations that meet a weight of this type are quantized to: a block type, realizar's block size, or None.

    The choices are those of `Arithmetic.activations`; float weights take activations as they are.
    """
    engine = block_format(block_type).activation
    if engine is None or kind == "as they are":
        return None
    if kind == "realizar":
        return ACTIVATION_BLOCKS.get(block_type)
    if kind == "per 32":
        return "Q8_1"
    if kind == "per 256":
        return "Q8_K" if columns % 256 == 0 else "Q8_0"
    return engine


def through_blocks(x: Float[np.ndarray, "position in"], kind: Activations, block_type: str) -> np.ndarray:
    """`x` rounded or quantized, and decoded again."""
    if kind in ("float16", "bfloat16"):
        return rounded(x, kind, np)
    partner = partner_of(kind, block_type, x.shape[1])
    x = np.asarray(x, np.float32)
    if partner is None:
        return x
    if isinstance(partner, int):
        return _realizar(x, partner)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block_format(partner).block_size)))
    quantized = QUANTIZERS[partner](padded)
    values = quantized.codes.astype(np.float32) * quantized.scale[..., None]
    return values.reshape(padded.shape)[:, : x.shape[1]]


def _realizar(x: np.ndarray, size: int) -> np.ndarray:
    """Scale max|x| / 127 in float32, codes with ties away from zero (`aprjax.qwen2.realizar.quantize`)."""
    if x.shape[1] % size:
        return x
    blocks = x.reshape(len(x), -1, size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = np.sign(ratio) * np.floor(np.abs(ratio) + np.float32(0.5))
    return (np.clip(codes, -128, 127) * scale).reshape(x.shape)
