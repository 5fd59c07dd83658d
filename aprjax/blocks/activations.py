"""Activation blocks: what ggml's `vec_dot` multiplies quantized weights with. Never found in files.

Byte maps (ggml-common.h `block_q8_0`, `block_q8_1`, `block_q8_K`):

    Q8_0   34 bytes /  32: 0-1 d  2-33 int8
    Q8_1   36 bytes /  32: 0-1 d  2-3 s = float16(d * sum q)  4-35 int8
    Q8_K  292 bytes / 256: 0-3 d (float32)  4-259 int8  260-291 int16 sums of 16

The quantizers reproduce ggml's x86 build (kernels.md section 2): Q8_0 and Q8_1 multiply by 127/amax and
round half to even (the offline Q8_0 encoder does neither), Q8_K is the reference routine. One source serves
NumPy and JAX. Input must be finite. Blocks whose inverse scale overflows (amax below 127/FLT_MAX = 3.7e-37)
are undefined in ggml (it converts infinities to integers); here they quantize to zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aprjax.blocks.fields import Fields, half, namespace, reinterpret


class ActivationBlocks(NamedTuple):
    """Quantized activations, NumPy or JAX as the input was.

    Attributes:
        codes: int8 `[..., blocks, block_size]`, in -127..127.
        scale: float32 `[..., blocks]`; for Q8_0 and Q8_1 already rounded to float16, as the dot uses it
            (the codes were made with the unrounded one).
        sums: Q8_1: float32 `[..., blocks]`, s = float16(d * sum of codes) with the unrounded d.
            Q8_K: int16 `[..., blocks, 16]`, sums of 16 codes. Q8_0: None.
    """

    codes: Any
    scale: Any
    sums: Any = None


def unpack_q8_1(blocks: Any) -> Fields:
    """Q8_1: q * d; `s` only serves the dot."""
    return Fields(reinterpret(blocks[..., 4:36], np.int8)[..., None, :], half(blocks[..., 0:2]))


def unpack_q8_k(blocks: Any) -> Fields:
    """Q8_K: q * d; the sums only serve the dot."""
    scale = reinterpret(blocks[..., 0:4], np.float32)[..., 0]
    return Fields(reinterpret(blocks[..., 4:260], np.int8)[..., None, :], scale)


def _blocked(x: Any, size: int) -> Any:
    if x.shape[-1] % size:
        raise ValueError(f"width {x.shape[-1]} is no multiple of the activation block, {size}")
    return x.astype(np.float32).reshape(*x.shape[:-1], -1, size)


def _pinned(value: Any) -> Any:
    """Keeps XLA from rewriting the arithmetic around `value`, such as 1/(a/b) as b/a (one ulp off)."""
    if isinstance(value, np.ndarray):
        return value
    import jax

    return jax.lax.optimization_barrier(value)


def _quotient(numerator: Any, divisor: Any, valid: Any) -> Any:
    """`numerator / divisor` where `valid`, else 0."""
    xp = namespace(divisor)
    return xp.where(valid, numerator / xp.where(valid, divisor, np.float32(1)), np.float32(0))


def _through_half(value: Any) -> Any:
    """Rounded to float16 and back: to nearest even, to infinity above 65504, as ggml stores it."""
    if namespace(value) is np:
        with np.errstate(over="ignore"):
            return value.astype(np.float16).astype(np.float32)
    from aprjax.blocks.halves import through_half

    return through_half(value)


# 127/amax overflows below this (FLT_MAX = 3.4028235e38): see the module's docstring.
_SMALLEST_AMAX = np.float32(3.7322e-37)


def _eight_bits(x: Any) -> tuple[Any, Any]:
    """Codes int8 `[..., blocks, 32]` and the unrounded scale float32 `[..., blocks]`."""
    xp = namespace(x)
    values = _blocked(x, 32)
    largest = xp.abs(values).max(axis=-1)
    # ggml divides both times; a barrier hides the constant, lest XLA multiply by 1/127 instead.
    scale = largest / _pinned(np.float32(127) + xp.zeros_like(largest))
    inverse = _quotient(np.float32(127), largest, largest > _SMALLEST_AMAX)
    return xp.rint(values * inverse[..., None]).astype(np.int8), scale


def quantize_q8_0(x: Any) -> ActivationBlocks:
    """Q8_0 activations of `x`, float32 `[..., width]` (ggml x86 `quantize_row_q8_0`)."""
    codes, scale = _eight_bits(x)
    return ActivationBlocks(codes, _through_half(scale))


def quantize_q8_1(x: Any) -> ActivationBlocks:
    """Q8_1 activations of `x`, float32 `[..., width]` (ggml x86 `quantize_row_q8_1`)."""
    codes, scale = _eight_bits(x)
    sums = scale * codes.sum(axis=-1, dtype=np.int32).astype(np.float32)
    return ActivationBlocks(codes, _through_half(scale), _through_half(sums))


def quantize_q8_k(x: Any) -> ActivationBlocks:
    """Q8_K activations of `x`, float32 `[..., width]` (ggml `quantize_row_q8_K_ref`).

    The scale is negative when the first element of largest magnitude is positive: that element becomes -127.
    A block of zeros has scale 0 and sums 0 (ggml leaves its sums unwritten).
    """
    xp = namespace(x)
    values, largest = _blocks_of_256(x)
    # The sign of the *first* of the largest elements, as one integer maximum: an argmax and a gather
    # would be far slower under XLA. Earlier elements get larger keys; the lowest bit carries the sign.
    order = np.arange(256, 0, -1, dtype=np.int32) * 2
    keys = xp.where(xp.abs(values) == largest[..., None], order + (values > 0), np.int32(0))
    return _signed_blocks(values, largest, (keys.max(axis=-1) & 1) == 1)


def quantize_q8_k_by_fours(x: Any) -> ActivationBlocks:
    """The same as ggml quantizes four rows at a time for repacked weights (`ggml_quantize_mat_q8_K_4x8`, AVX2).

    The scale is negative when *any* element of largest magnitude is positive, which is another one only at ties of
    both signs.
    """
    values, largest = _blocks_of_256(x)
    return _signed_blocks(values, largest, (values == largest[..., None]).any(axis=-1))


def _blocks_of_256(x: Any) -> tuple[Any, Any]:
    """Float32 `[..., blocks, 256]`, and the largest magnitudes `[..., blocks]`."""
    values = _blocked(x, 256)
    return values, namespace(x).abs(values).max(axis=-1)


def _signed_blocks(values: Any, largest: Any, positive: Any) -> ActivationBlocks:
    xp = namespace(values)
    signed = xp.where(positive, largest, -largest)
    valid = largest > _SMALLEST_AMAX
    inverse = _pinned(_quotient(np.float32(-127), signed, valid))
    codes = xp.minimum(xp.rint(values * inverse[..., None]), np.float32(127)).astype(np.int8)
    scale = _quotient(np.float32(1), inverse, valid)
    sums = codes.reshape(*codes.shape[:-1], 16, 16).sum(axis=-1, dtype=np.int16)
    return ActivationBlocks(codes, scale, sums)


QUANTIZERS = {"Q8_0": quantize_q8_0, "Q8_1": quantize_q8_1, "Q8_K": quantize_q8_k}
