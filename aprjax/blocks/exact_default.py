"""The default build's kernels, bit for bit, in JAX: tiles, repacked weights, and which kernel ggml takes.

The specification is default_twins.py. Integers are exact as in exact.py: float32 dots of pieces whose sums stay below
2^24, added as int32 where a block takes several.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.activations import ActivationBlocks, quantize_q8_0, quantize_q8_k, quantize_q8_k_by_fours
from aprjax.blocks.dot import exact_piece
from aprjax.blocks.exact_pieces import lane_dot, over_pieces
from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.relay import CODE_WIDTHS, Relaid, join_planes

TILED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# On x86 with AVX2. AVX-512 adds Q2_K; IQ4_NL and MXFP4 are not computed here.
REPACKED = ("Q4_0", "Q4_K")
# `ggml_tiled_min_batch` (tiled.cpp), and the least batch of `llamafile_sgemm`.
_LEAST_TILED, _LEAST_TINYBLAS = 8, 2
# Rows that are interleaved.
_ROWS_TOGETHER = 8


@dataclass(frozen=True)
class ProductKernel:
    """One of ggml's kernels.

    Attributes:
        integers: how quantized weights are multiplied.
        registers: of running sums, for plain weights: 4 in `vec_dot`, 1 in tinyBLAS.
        lanes: of such a register: 8, or 16 with AVX-512.
    """

    integers: Literal["vec_dot", "tiled", "repack"] = "vec_dot"
    registers: Literal[1, 4] = 4
    lanes: Literal[8, 16] = 8


VEC_DOT = ProductKernel()


def product_kernel(
    name: str, *, rows: int, tokens: int, available: Collection[str], lanes: Literal[8, 16] = 8
) -> ProductKernel:
    """The kernel that ggml takes for a product of `tokens` rows of activations (`ggml_compute_forward_mul_mat`).

    Args:
        name: the weights' block type.
        rows: output features.
        tokens: rows of the batch.
        available: of "repack", "tiled" and "tinyblas", those that the build has and the run allows.
        lanes: of a register of floats.
    """
    if "repack" in available and name in REPACKED and rows % _ROWS_TOGETHER == 0:
        return ProductKernel("repack", lanes=lanes)
    if "tiled" in available and name in TILED and tokens >= _LEAST_TILED:
        return ProductKernel("tiled", lanes=lanes)
    return ProductKernel(registers=1 if "tinyblas" in available and tokens >= _LEAST_TINYBLAS else 4, lanes=lanes)


def _block_codes(piece: Relaid) -> Any:
    """Codes, times group scales if any: float32 `[blocks, size, rows]`."""

    def block(step: Any) -> Any:
        planes, group_scales = step
        codes = join_planes(planes, CODE_WIDTHS[piece.name]).astype(jnp.float32)
        if group_scales is None:
            return codes
        grouped = codes.reshape(group_scales.shape[0], -1, codes.shape[-1])
        return (grouped * group_scales.astype(jnp.float32)[:, None]).reshape(codes.shape)

    return jax.vmap(block)((piece.codes, piece.group_scales))


def _exact_sums(activations: Any, codes: Any, piece: int) -> Any:
    """`[tokens, size]` by `[size, rows]`, `piece` elements at a time: exact float32 `[size / piece, tokens, rows]`."""
    tokens, size = activations.shape
    left = jnp.swapaxes(activations.astype(jnp.float32).reshape(tokens, size // piece, piece), 0, 1)
    return lane_dot(left, codes.reshape(size // piece, piece, -1))


def _as_one(sums: Any) -> Any:
    """Exact integers `[n, …]` added, and rounded to float32 once."""
    return sums[0] if sums.shape[0] == 1 else sums.astype(jnp.int32).sum(axis=0).astype(jnp.float32)


def _group_sums(piece: Relaid, quantized: ActivationBlocks) -> Any:
    """The activations' sums over the groups of the weights' minimums: float32 `[blocks, tokens, groups]`, or None."""
    if piece.group_minimums is None:
        return None
    groups = piece.group_minimums.shape[1]
    sums = quantized.sums.astype(jnp.float32)
    return jnp.swapaxes(sums.reshape(*sums.shape[:-1], groups, -1).sum(axis=-1), 0, 1)


def _steps(piece: Relaid, quantized: ActivationBlocks) -> tuple[Any, ...]:
    """What a scan over the blocks goes through."""
    return (
        _block_codes(piece),
        piece.scale.astype(jnp.float32),
        None if piece.minimum is None else piece.minimum.astype(jnp.float32),
        piece.group_minimums,
        jnp.swapaxes(quantized.codes, 0, 1),
        jnp.swapaxes(quantized.scale, 0, 1)[..., None],
        _group_sums(piece, quantized),
    )


def tiled_piece(piece: Relaid, quantized: ActivationBlocks) -> Any:
    """`default_twins.tiled_dot` of all tokens by one piece of rows: float32 `[tokens, rows]`."""

    def scan_block(total: Any, step: Any) -> tuple[Any, None]:
        codes, scale, minimum, group_minimums, activations, activation_scale, sums = step
        block = scale * _as_one(_exact_sums(activations, codes, exact_piece(piece.name)))
        if minimum is not None:
            # At most 256 * 127 * 63: exact in one sum.
            lows = lane_dot(sums[None], group_minimums.astype(jnp.float32)[None])[0]
            block = fused_multiply_add(-minimum, lows, block)
        return fused_multiply_add(block, activation_scale, total), None

    start = jnp.zeros((quantized.codes.shape[0], piece.chunk_rows), jnp.float32)
    return lax.scan(scan_block, start, _steps(piece, quantized))[0]


def repacked_product(packed: Relaid, x: Any) -> Any:
    """`default_twins.repacked_matmul`: `x[tokens, in]` -> float32 `[tokens, rows]`."""
    tokens = x.shape[0]
    together = tokens - tokens % 4
    done = []
    for part, fours in ((x[:together], True), (x[together:], False)):
        if not part.shape[0]:
            continue
        if packed.name == "Q4_0":
            quantized = quantize_q8_0(part)
        else:
            quantized = quantize_q8_k_by_fours(part) if fours else quantize_q8_k(part)
        # Of Q4_K, fours add the sums of 64 elements one by one; otherwise a block is one sum.
        steps = 4 if fours and packed.name == "Q4_K" else 1

        def multiply(piece: Relaid, quantized: ActivationBlocks = quantized, steps: int = steps) -> Any:
            return _repacked_piece(piece, quantized, steps)

        done.append(over_pieces(packed, part.shape[0], multiply))
    return jnp.concatenate(done)


def _repacked_piece(piece: Relaid, quantized: ActivationBlocks, steps: int) -> Any:
    """All tokens by one piece of rows: float32 `[tokens, rows]`; a block's integers come in `steps` parts."""

    def scan_block(carry: Any, step: Any) -> tuple[Any, None]:
        total, total_lows = carry
        codes, scale, minimum, group_minimums, activations, activation_scale, sums = step
        size = codes.shape[0] // steps
        parts = _exact_sums(activations, codes, min(size, exact_piece(piece.name)))
        parts = parts.reshape(steps, -1, *parts.shape[1:])
        outer = scale * activation_scale
        for index in range(steps):
            total = fused_multiply_add(_as_one(parts[index]), outer, total)
        if minimum is not None:
            outer_low = minimum * activation_scale
            groups = group_minimums.shape[0] // steps
            lows = _exact_sums(sums, group_minimums.astype(jnp.float32), groups)
            for index in range(steps):
                total_lows = fused_multiply_add(lows[index], outer_low, total_lows)
        return (total, total_lows), None

    nothing = jnp.zeros((quantized.codes.shape[0], piece.chunk_rows), jnp.float32)
    (total, total_lows), _ = lax.scan(scan_block, (nothing, nothing), _steps(piece, quantized))
    return total - total_lows if piece.minimum is not None else total
