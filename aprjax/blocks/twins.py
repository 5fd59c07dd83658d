"""What ggml's `vec_dot` routines compute, operation for operation, in NumPy: the specification of exact.py.

ggml has one routine per block type (`ggml_vec_dot_*` in ggml-cpu/arch/x86/quants.c, AVX2 branches; the build with
AVX-512 takes the same ones). They share a frame:

- The weights meet activations quantized to Q8_0, Q8_1 or Q8_K.
- A register has eight 32-bit lanes. Lane L sums the products of elements 4L … 4L+3 of every 32 as an integer.
- The integer becomes a float32, is multiplied by the product of the two blocks' scales (rounded to float32) and
  added to the lane's running sum with one rounding: a fused multiply-add.
- After the last block the eight running sums are added pairwise.

They differ in how group scales, minimums and offsets come in, which is what the functions below spell out.

Every function takes all rows at once: `…` are any leading axes. It goes through the blocks one by one, because
that is the order of the float sums. These functions explain and check; exact.py is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from aprjax.blocks.activations import QUANTIZERS, ActivationBlocks
from aprjax.blocks.fields import Fields
from aprjax.blocks.float_twins import fused_multiply_add
from aprjax.blocks.registry import block_format


class BlockPair(NamedTuple):
    """One block of weights and the block of activations it meets; integers as int64.

    Attributes:
        products: code by code `[…, size]`; times the group's scale where the type has group scales.
        scale: weights' scale times activations' scale, rounded: float32 `[…]`.
        weights: the block's fields.
        activation_scale: float32 `[…]`.
        activation_sums: of Q8_K, int64 `[…, 16]`; of Q8_1, float32 `[…]`; None.
    """

    products: np.ndarray
    scale: np.ndarray
    weights: Fields
    activation_scale: np.ndarray
    activation_sums: np.ndarray | None


def block_pairs(fields: Fields, activations: ActivationBlocks, *, code_offset: int = 0) -> Iterator[BlockPair]:
    """The pairs in order. `code_offset` is added to every code."""
    for block in range(fields.scale.shape[-1]):
        weights = Fields(
            codes=fields.codes[..., block, :, :].astype(np.int64) + code_offset,
            scale=fields.scale[..., block],
            group_scales=None if fields.group_scales is None else fields.group_scales[..., block, :].astype(np.int64),
            minimum=None if fields.minimum is None else fields.minimum[..., block],
            group_minimums=None
            if fields.group_minimums is None
            else fields.group_minimums[..., block, :].astype(np.int64),
        )
        codes = weights.codes if weights.group_scales is None else weights.codes * weights.group_scales[..., None]
        codes = codes.reshape(*codes.shape[:-2], -1)
        scale = activations.scale[..., block]
        sums = activations.sums
        if sums is not None:
            sums = sums[..., block, :].astype(np.int64) if sums.dtype == np.int16 else sums[..., block]
        products = codes * activations.codes[..., block, :].astype(np.int64)
        yield BlockPair(products, weights.scale * scale, weights, scale, sums)


def _lane_sums(products: np.ndarray) -> np.ndarray:
    """int64 `[…, size]` -> `[…, 8]`: lane L has elements 4L … 4L+3 of every 32."""
    return products.reshape(*products.shape[:-1], -1, 8, 4).sum(axis=(-3, -1))


def neighbours(values: np.ndarray) -> np.ndarray:
    """Sums of two neighbours: `[…, 2n]` -> `[…, n]`."""
    return values[..., 0::2] + values[..., 1::2]


def _accumulate(scale: np.ndarray, integers: np.ndarray, sums: np.ndarray | np.float32) -> np.ndarray:
    """`scale` `[…]` times integers `[…, lanes]`, as float32, added to the running sums with one rounding."""
    return fused_multiply_add(scale[..., None], integers.astype(np.float32), sums)


def _add_four(sums: np.ndarray) -> np.ndarray:
    """`hsum_float_4`: float32 `[…, 4]` -> `[…]`."""
    pairs = sums[..., 0:2] + sums[..., 2:4]
    return pairs[..., 0] + pairs[..., 1]


def add_eight(sums: np.ndarray) -> np.ndarray:
    """`hsum_float_8`: float32 `[…, 8]` -> `[…]`."""
    return _add_four(sums[..., 4:8] + sums[..., 0:4])


_NOTHING = np.float32(0)


def _scaled_codes(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q4_0, Q5_0, Q8_0, Q3_K: signed codes, with group scales (Q3_K) or without."""
    sums = _NOTHING
    for pair in block_pairs(fields, activations):
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
    return add_eight(np.asarray(sums))


def _scaled_codes_and_minimum(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q4_1, Q5_1: unsigned codes; m times the activations' sum has one running sum of its own."""
    sums, lows = _NOTHING, _NOTHING
    for pair in block_pairs(fields, activations):
        assert pair.weights.minimum is not None
        assert pair.activation_sums is not None
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
        # `minimum` is subtracted in `Fields`; the block has m = -minimum.
        lows = fused_multiply_add(-pair.weights.minimum, pair.activation_sums, lows)
    return add_eight(np.asarray(sums)) + lows


def _sums_of_minimums(pair: BlockPair) -> tuple[np.ndarray, np.ndarray]:
    """-(d_y * dmin) `[…]`; minimums times activation sums, two neighbouring groups added: int64 `[…, groups / 2]`."""
    assert pair.weights.group_minimums is not None
    assert pair.activation_sums is not None
    sums = pair.activation_sums
    if pair.weights.group_minimums.shape[-1] == 8:
        sums = neighbours(sums)  # groups of 32, sums of 16
    return -pair.activation_scale * pair.weights.minimum, neighbours(pair.weights.group_minimums * sums)


def _q4_k(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q4_K: the minimums have four running sums."""
    sums, lows = _NOTHING, _NOTHING
    for pair in block_pairs(fields, activations):
        lows = _accumulate(*_sums_of_minimums(pair), lows)
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
    return add_eight(np.asarray(sums)) + _add_four(np.asarray(lows))


def _q5_k(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q5_K: the minimums have one running sum."""
    sums, lows = _NOTHING, _NOTHING
    for pair in block_pairs(fields, activations):
        scale, integers = _sums_of_minimums(pair)
        lows = _accumulate(scale, integers.sum(axis=-1, keepdims=True), lows)
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
    return add_eight(np.asarray(sums)) + np.asarray(lows)[..., 0]


def _q2_k(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q2_K: the minimums go into the same eight running sums, before the codes."""
    sums = _NOTHING
    for pair in block_pairs(fields, activations):
        sums = _accumulate(*_sums_of_minimums(pair), sums)
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
    return add_eight(np.asarray(sums))


def _q6_k(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    """Q6_K: codes stay unsigned; the offset of 32 is taken off lane L for groups 2L and 2L+1, wherever they lie."""
    sums = _NOTHING
    for pair in block_pairs(fields, activations, code_offset=32):
        offsets = 32 * neighbours(pair.weights.group_scales * pair.activation_sums)
        sums = _accumulate(pair.scale, _lane_sums(pair.products) - offsets, sums)
    return add_eight(np.asarray(sums))


_TWINS: dict[str, Callable[[Fields, ActivationBlocks], np.ndarray]] = {
    "Q4_0": _scaled_codes,
    "Q4_1": _scaled_codes_and_minimum,
    "Q5_0": _scaled_codes,
    "Q5_1": _scaled_codes_and_minimum,
    "Q8_0": _scaled_codes,
    "Q2_K": _q2_k,
    "Q3_K": _scaled_codes,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def vec_dot(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The dot products of weight rows with activation rows as ggml's AVX2 `vec_dot` computes them.

    Args:
        name: one of the ten quantized types.
        packed: `uint8[…, blocks, block_bytes]`.
        x: float32 `[…, width]`; its leading axes broadcast with those of `packed`.

    Returns:
        float32 `[…]`. Subnormal results are kept, as in ggml.

    Raises:
        ValueError: there is no twin of that type, or the widths differ.
    """
    blocks = block_format(name)
    if name not in _TWINS or blocks.unpack is None or blocks.activation is None:
        raise ValueError(f"{name} has no twin; there are {', '.join(_TWINS)}")
    width = packed.shape[-2] * blocks.block_size
    if x.shape[-1] != width:
        raise ValueError(f"{name} weights of {packed.shape[-2]} blocks take x[…, {width}], found {list(x.shape)}")
    return dot_of_blocks(name, packed, QUANTIZERS[blocks.activation](x))


def dot_of_blocks(name: str, packed: np.ndarray, activations: ActivationBlocks) -> np.ndarray:
    """`vec_dot` of activations that are quantized already, by whatever rule."""
    unpack = block_format(name).unpack
    assert unpack is not None
    # Infinite scales and sums beyond float32 give infinities and NaN, as in ggml.
    with np.errstate(over="ignore", invalid="ignore"):
        return _TWINS[name](unpack(packed), activations)


def running_lanes(name: str, packed: np.ndarray, activations: ActivationBlocks) -> np.ndarray:
    """The eight running sums of a type without minimums, before they are added: float32 `[…, 8]`."""
    unpack = block_format(name).unpack
    assert unpack is not None
    sums = _NOTHING
    for pair in block_pairs(unpack(packed), activations):
        sums = _accumulate(pair.scale, _lane_sums(pair.products), sums)
    return np.asarray(sums)
