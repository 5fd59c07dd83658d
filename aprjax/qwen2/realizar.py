"""What realizar computes otherwise than llama.cpp: activation blocks, RMSNorm, softmax (kernels.md section 7).

Read from its source (40edaa93), not run: no build of it was at hand. tests/qwen2/twins.py specifies
each in NumPy. Sums here are in realizar's order: they are short.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from aprjax.blocks.activations import ActivationBlocks
from aprjax.blocks.exact import vec_dot_piece
from aprjax.blocks.exact_pieces import add_eight, over_pieces
from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.relay import Relaid
from aprjax.qwen2.rounding import added, narrow, wide

# Which activation blocks each weight type takes. The others are multiplied as float32: Q5_K and Q6_K decoded
# on the fly, Q5_0 and Q4_1 decoded as whole matrices.
ACTIVATION_BLOCKS = {"Q4_K": 256, "Q4_0": 32, "Q8_0": 32}
_LARGEST_CODE = 127
# trueno's AVX2 sum of squares: four accumulators of eight lanes.
_ACCUMULATORS, _LANES = 4, 8


def quantize(x: Float[Array, "position width"], size: int) -> tuple[Array, Array]:
    """Blocks of `size`: codes int8 `[position, blocks, size]` and float32 scales `[position, blocks]`.

    The scale is max|x| / 127, never negative and not rounded to float16 (1/127 for a block of zeros);
    codes are rounded with ties away from zero and clamped to -128 … 127.
    """
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, size)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    # Barriers: XLA would multiply by 1/127, and turn 1/(a/b) into b/a.
    divisor = lax.optimization_barrier(jnp.full_like(largest, _LARGEST_CODE))
    scale = lax.optimization_barrier(jnp.where(largest > 0, largest, 1) / divisor)
    scaled = blocks * (1 / scale)[..., None]
    whole = jnp.trunc(scaled)
    # Exact: the fraction of a float32 is one.
    away = jnp.where(jnp.abs(scaled - whole) >= 0.5, jnp.sign(scaled), 0)
    return jnp.clip(whole + away, -_LARGEST_CODE - 1, _LARGEST_CODE).astype(jnp.int8), scale


def integer_matmul(weight: Relaid, x: Float[Array, "position in"]) -> Float[Array, "position out"]:
    """`x W^T` by integer dots: Q4_K, Q4_0 and Q8_0, activations quantized by `quantize`.

    Q4_K is ggml's own kernel (`ggml_style_q4k_q8k_dot_avx2_raw`): its lanes, its fused sums, its order. Q4_0 and
    Q8_0 have a fused multiply-add per block and are added by `hadd`; that their lanes hold the same four
    neighbours as ggml's, and that the halves of the register are added first, is assumed.
    """
    size = ACTIVATION_BLOCKS[weight.name]
    codes, scale = quantize(x, size)
    # realizar stores no sums of the codes: it makes them when the minimums need them.
    sums = codes.reshape(*codes.shape[:-1], -1, 16).sum(axis=-1, dtype=jnp.int16) if weight.name == "Q4_K" else None
    quantized = ActivationBlocks(codes, scale, sums)
    add_lanes = add_eight if weight.name == "Q4_K" else _add_by_hadd
    return over_pieces(weight, x.shape[0], lambda piece: vec_dot_piece(piece, quantized, add_lanes))


def _add_by_hadd(lanes: Any) -> Any:
    """Halves of the register, then neighbours, twice: float32 `[8, …]` -> `[…]`."""
    four = lanes[0:4] + lanes[4:8]
    return (four[0] + four[1]) + (four[2] + four[3])


def rms_norm_sequential(x: Float[Array, "position hidden"], weight: Array, eps: Any) -> Array:
    """Apr's traced path: squares rounded, one float32 accumulator; `x / rms * weight`."""
    with jax.enable_x64(True):
        squares = narrow(wide(x) * wide(x))
        # In float64, rounded: a float32 division by a square root becomes XLA's inverse square root.
        normed = narrow(wide(x) / wide(_root(_running_sum(squares), x.shape[-1], eps)))
    return normed * weight.astype(jnp.float32)


def rms_norm_lanes(x: Float[Array, "position hidden"], weight: Array, eps: Any) -> Array:
    """Trueno's AVX2 sum of squares, one FMA each; `x * (1 / rms) * weight`.

    Which accumulators are added first at the end is not in the facts: neighbours are, then halves of the vector.
    """
    step = _ACCUMULATORS * _LANES
    missing = -x.shape[-1] % step
    # Zeros add nothing to any lane.
    columns = jnp.pad(x, ((0, 0), (0, missing))).reshape(x.shape[0], -1, _ACCUMULATORS, _LANES).swapaxes(0, 1)
    start = jnp.zeros(columns.shape[1:], jnp.float32)
    sums = lax.scan(lambda sums, part: (fused_multiply_add(part, part, sums), None), start, columns)[0]
    lanes = (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])
    lanes = lanes[:, :4] + lanes[:, 4:]
    lanes = lanes[:, :2] + lanes[:, 2:]
    root = _root(lanes[:, 0] + lanes[:, 1], x.shape[-1], eps)
    with jax.enable_x64(True):
        inverse = narrow(1 / wide(root))
    return x * inverse * weight.astype(jnp.float32)


def _root(total: Float[Array, " position"], width: int, eps: Any) -> Float[Array, "position 1"]:
    # A barrier around the constant: XLA would multiply by its rounded inverse.
    mean = total / lax.optimization_barrier(jnp.full_like(total, width))
    return jnp.sqrt(added(mean, jnp.asarray(eps, jnp.float32)))[:, None]


def _running_sum(values: Any) -> Any:
    """One float32 accumulator over the last axis."""
    columns = jnp.moveaxis(values, -1, 0)
    return lax.scan(lambda total, column: (added(total, column), None), jnp.zeros_like(columns[0]), columns)[0]


def _exponentials(scores: Any, visible: Any, exponential: Any) -> Any:
    largest = jnp.max(jnp.where(visible[None], scores, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(visible[None], narrow(exponential(wide(added(scores, -largest)))), jnp.float32(0))


def softmax_sequential(
    scores: Float[Array, "head position key"], visible: Bool[Array, "position key"], exponential: Any
) -> Float[Array, "head position key"]:
    """One float32 accumulator, then a multiplication by its inverse."""
    exponentials = _exponentials(scores, visible, exponential)
    return exponentials * (jnp.float32(1) / _running_sum(exponentials))[..., None]


def softmax_float(
    scores: Float[Array, "head position key"], visible: Bool[Array, "position key"], exponential: Any
) -> Float[Array, "head position key"]:
    """`functional.masked_softmax` with another exponential."""
    exponentials = _exponentials(scores, visible, exponential)
    return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)
