"""Matrix products that equal ggml's bit for bit, in JAX: `exact_matmul`.

Here is `vec_dot`, all that the plain AVX2 build has; its specification is twins.py. Other builds' kernels are in
exact_default.py, plain floats in exact_floats.py.
Three things make the bits:

- Integers. Each of eight lanes L of a vector register sums elements 4L … 4L+3 of every 32 of a block. Here that is a
  float32 dot over the lane's 4 or 32 elements, exact because it stays below 2^24 in whatever order:
  4 * 128 * 127 for Q8_0, 32 * 31 * 63 * 127 for Q5_K; Q6_K with 32 * 63 * 128 * 127 is summed in two halves.
- Scales: one float32 product per block, weight scale times activation scale.
- The running sums, one per lane, block after block: `fused_multiply_add(scale, integer, sum)`. The eight are added in
  ggml's order at the end.

Rows are computed in pieces small enough that the running sums stay in the processor's cache; a piece and its
decoded weights are all the memory that a product takes beside its inputs and its output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.activations import QUANTIZERS, ActivationBlocks
from aprjax.blocks.dot import no_cotangent, transposed_matmul
from aprjax.blocks.exact_default import VEC_DOT, ProductKernel, repacked_product, tiled_piece
from aprjax.blocks.exact_floats import exact_dot, exact_dot_f16, exact_dot_f32
from aprjax.blocks.exact_pieces import LANES, add_eight, add_four, lane_dot, over_pieces
from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.registry import block_format
from aprjax.blocks.relay import CODE_WIDTHS, Relaid, join_planes

__all__ = ["exact_dot", "exact_dot_f16", "exact_dot_f32", "exact_matmul", "vec_dot_piece"]


def _lane_weights(piece: Relaid) -> Any:
    """Codes, times group scales if any, by lane: float32 `[blocks, 8, n, rows]`, n = 4 or 32 elements of a lane.

    Q6_K's codes stay unsigned, 0 … 63, as its kernel has them.
    """
    width = CODE_WIDTHS[piece.name]

    def block(step: Any) -> Any:
        planes, group_scales = step
        codes = join_planes(planes, width).astype(jnp.float32)
        if piece.name == "Q6_K":
            codes = codes + jnp.float32(width.offset)
        if group_scales is not None:
            grouped = codes.reshape(group_scales.shape[0], -1, codes.shape[-1])
            codes = (grouped * group_scales.astype(jnp.float32)[:, None]).reshape(codes.shape)
        return jnp.swapaxes(codes.reshape(-1, LANES, 4, codes.shape[-1]), 0, 1).reshape(LANES, -1, codes.shape[-1])

    return jax.vmap(block)((piece.codes, piece.group_scales))


def _lane_activations(codes: Any) -> Any:
    """int8 `[tokens, blocks, size]` -> float32 `[blocks, 8, tokens, n]` in the order of `_lane_weights`."""
    tokens, blocks, _ = codes.shape
    lanes = codes.reshape(tokens, blocks, -1, LANES, 4).transpose(1, 3, 0, 2, 4)
    return lanes.reshape(blocks, LANES, tokens, -1).astype(jnp.float32)


def _pairs_of_sums(sums: Any, factors: Any) -> Any:
    """Activation sums times small factors, two neighbours added: `[tokens, 2p]`, `[2p, rows]` -> `[p, tokens, rows]`.

    Exact in float32: at most 2 * 32 * 127 * 63 (minimums of Q4_K) or 2 * 16 * 127 * 128 (scales of Q6_K).
    """
    pairs, tokens = factors.shape[0] // 2, sums.shape[0]
    left = jnp.swapaxes(sums.astype(jnp.float32).reshape(tokens, pairs, 2), 0, 1)
    return lane_dot(left, factors.astype(jnp.float32).reshape(pairs, 2, -1))


def _six_bit_integers(activations: Any, weights: Any, sums: Any, group_scales: Any) -> Any:
    """Q6_K's lane integers, rounded to float32 as one int32 is; its offset of 32 falls to lane group / 2."""
    half = weights.shape[1] // 2
    lower = lane_dot(activations[:, :, :half], weights[:, :half])
    upper = lane_dot(activations[:, :, half:], weights[:, half:])
    offsets = _pairs_of_sums(sums, group_scales).astype(jnp.int32) * 32
    return (lower.astype(jnp.int32) + upper.astype(jnp.int32) - offsets).astype(jnp.float32)


def vec_dot_piece(piece: Relaid, quantized: ActivationBlocks, add_lanes: Any = add_eight) -> Any:
    """All tokens by one piece of rows: float32 `[tokens, rows]`; `add_lanes` is how the eight lanes become one sum."""
    name = piece.name
    tokens, rows = quantized.codes.shape[0], piece.chunk_rows

    def by_block(array: Any) -> Any:
        return None if array is None else jnp.swapaxes(array, 0, 1)

    def scan_block(carry: Any, step: Any) -> tuple[Any, None]:
        lanes, lows = carry
        weights, scale, group_scales, minimum, group_minimums, activations, activation_scale, sums = step
        outer = activation_scale[:, None] * scale.astype(jnp.float32)
        if minimum is not None and group_minimums is not None:
            outer_low = -activation_scale[:, None] * minimum.astype(jnp.float32)
            if name == "Q2_K":
                lanes = fused_multiply_add(outer_low, _pairs_of_sums(sums, group_minimums), lanes)
            else:
                # Q8_K's sums cover 16 elements, these minimums 32.
                together = sums.astype(jnp.float32).reshape(tokens, 8, 2).sum(axis=-1)
                pairs = _pairs_of_sums(together, group_minimums)
                if name == "Q5_K":
                    pairs = pairs.sum(axis=0, keepdims=True)
                lows = fused_multiply_add(outer_low, pairs, lows)
        elif minimum is not None:
            lows = fused_multiply_add(-minimum.astype(jnp.float32), sums[:, None], lows)
        if name == "Q6_K":
            integers = _six_bit_integers(activations, weights, sums, group_scales)
        else:
            integers = lane_dot(activations, weights)
        return (fused_multiply_add(outer, integers, lanes), lows), None

    low_sums = {"Q4_K": 4, "Q5_K": 1, "Q4_1": 1, "Q5_1": 1}.get(name, 0)
    start = (jnp.zeros((LANES, tokens, rows), jnp.float32), jnp.zeros((low_sums, tokens, rows), jnp.float32))
    steps = (
        _lane_weights(piece),
        piece.scale,
        piece.group_scales,
        piece.minimum,
        piece.group_minimums,
        _lane_activations(quantized.codes),
        by_block(quantized.scale),
        by_block(quantized.sums),
    )
    (lanes, lows), _ = lax.scan(scan_block, start, steps)
    total = add_lanes(lanes)
    if low_sums == 4:
        total = total + add_four(lows)
    elif low_sums == 1:
        total = total + lows[0]
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exact_matmul(name: str, kernel: ProductKernel, packed: Relaid, x: Any) -> Any:
    tokens = x.shape[0]
    if packed.plain:
        return over_pieces(
            packed, tokens, lambda piece: exact_dot(name, x, piece.codes[0], kernel.registers, kernel.lanes)
        )
    if kernel.integers == "repack":
        return repacked_product(packed, x)
    activation = block_format(name).activation
    assert activation is not None
    quantized = QUANTIZERS[activation](x)
    multiply = tiled_piece if kernel.integers == "tiled" else vec_dot_piece
    return over_pieces(packed, tokens, lambda piece: multiply(piece, quantized))


def _exact_forward(name: str, kernel: ProductKernel, packed: Relaid, x: Any) -> tuple[Any, Relaid]:
    return _exact_matmul(name, kernel, packed, x), packed


def _exact_backward(name: str, kernel: ProductKernel, packed: Relaid, cotangent: Any) -> tuple[Any, Any]:
    del kernel
    return jax.tree.map(no_cotangent, packed), transposed_matmul(name, packed, cotangent)


_exact_matmul.defvjp(_exact_forward, _exact_backward)


def exact_matmul(name: str, packed: Relaid, x: Any, kernel: ProductKernel = VEC_DOT) -> Any:
    """`x @ W.T`, every bit as ggml computes it: by `vec_dot`, or by another of its kernels.

    Differentiable straight through, as `integer_matmul`.

    Args:
        name: a quantized block type with an activation partner, or F32, F16, BF16: ggml rounds the activations to the
            weights' type then.
        packed: the weights, re-laid.
        x: float32 `[tokens, in]`: a whole batch, where the kernel depends on a row's place in it.
        kernel: by default that of the plain build; `product_kernel` says which one another build takes.

    Returns:
        float32 `[tokens, rows]`.

    Raises:
        ValueError: ggml has no product with the format, or the widths differ.
    """
    if packed.name != name:
        raise ValueError(f"weights were re-laid as {packed.name}, asked to multiply as {name}")
    if x.ndim != 2 or x.shape[1] != packed.columns:
        raise ValueError(f"{name} weights take x[tokens, {packed.columns}], found {list(x.shape)}")
    if not packed.plain and block_format(name).activation is None:
        raise ValueError(f"{name} is no type of ggml's: there is no product to be equal to")
    return _exact_matmul(name, kernel, packed, x.astype(jnp.float32))
