"""The integer dot of one token: nothing shares a decoded weight, so nothing is decoded to floats for a matrix product.

Codes are multiplied as int16 and summed over as many elements as int16 holds (`terms_together`), with the rows as the
fastest axis: one loop that reads each packed byte once. XLA's CPU backend makes it vectors of 16 or 32 numbers if

- an element is addressed by axes along which every bit plane is a broadcast (`codes_by_axes`): divisions of indices
  would stay in the loop;
- the loop holds nothing wider than int16;
- neither what makes the activation codes nor what adds up the sums is fused into it, as both would be computed
  again for every row or element (`walled`).

The bits are those of `dot.integer_matmul` for many tokens: the integers are exact in both, and the floats are added in
the same order (tests/blocks/test_dot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.activations import ActivationBlocks
from aprjax.blocks.registry import block_format
from aprjax.blocks.relay import CODE_WIDTHS, Relaid, codes_by_axes
from aprjax.blocks.roundings import block_terms, blocks_of_a_run, unknown_zero
from aprjax.blocks.units import accelerated

_LARGEST_ACTIVATION = 127
_LARGEST_INT16 = (1 << 15) - 1
# Where an int16 holds fewer products than this (Q8_0: 2), int32 sums leave less to be written.
_LEAST_TERMS = 8
# Weights of which sums are held at once: about 1 MB of them, as much as a second-level cache.
_ELEMENTS_TOGETHER = 1 << 23


def pays_for_one_token() -> bool:
    """Whether this is faster than a matrix product of one row: on a CPU (benchmarks/bench_dot.py times both).

    An accelerator has no use for it, and would wait for the host at every wall.
    """
    return not accelerated()


def terms_together(name: str) -> int:
    """How many products of a code and an activation one int16 holds the sum of: a power of two."""
    most = _LARGEST_INT16 // (CODE_WIDTHS[name].largest * _LARGEST_ACTIVATION)
    return 1 << (most.bit_length() - 1)


def walled(compute: Callable[..., Any], zero: Any, *operands: Any) -> Any:
    """`compute(*operands)`, an array, behind a branch that XLA cannot decide (`zero` is an `unknown_zero`).

    A barrier does not do: XLA's CPU backend takes barriers away before it fuses.
    """
    made = jax.eval_shape(compute, *operands)
    return lax.cond(zero == 0, compute, lambda *_: jnp.zeros(made.shape, made.dtype), *operands)


def part_sums(weights: Relaid, activations: Any) -> Any:
    """Exact sums of codes times activations over each group that shares a scale, or part of it.

    Args:
        weights: with the axes of `Relaid`.
        activations: int8 `[b, size]`, one token's.

    Returns:
        int16 or int32 `[c, b, parts, r]`: consecutive parts of a block, as many for each group.
    """
    name, size = weights.name, block_format(weights.name).block_size
    chunks, blocks, rows = weights.scale.shape
    groups = 1 if weights.group_scales is None else weights.group_scales.shape[-2]
    codes = codes_by_axes(weights.codes, CODE_WIDTHS[name], size)
    *axes, last = codes.shape[2:-1]
    most = min(terms_together(name), size // groups)
    length = last if most < _LEAST_TERMS else min(most, last)
    codes = codes.reshape(chunks, blocks, *axes, last // length, length, rows)
    factors = activations.astype(jnp.int16).reshape(blocks, *axes, last // length, length, 1)
    products = codes.astype(jnp.int16) * factors
    if most < _LEAST_TERMS:
        sums = products.astype(jnp.int32).sum(axis=-2, dtype=jnp.int32)
    else:
        sums = products.sum(axis=-2, dtype=jnp.int16)
    return sums.reshape(chunks, blocks, size // length, rows)


def block_integers(sums: Any, group_scales: Any) -> Any:
    """Each block's dot from its `part_sums`: int32 `[c, b, r]`."""
    if group_scales is not None:
        chunks, blocks, groups, rows = group_scales.shape
        grouped = _added(sums.reshape(chunks, blocks, groups, -1, rows).astype(jnp.int32), axis=3)
        sums = grouped * group_scales.astype(jnp.int32)
    return _added(sums.astype(jnp.int32), axis=2)


def _added(array: Any, axis: int) -> Any:
    """The sum along a short axis, written out: a reduction within a reduction is left scalar by XLA."""
    parts = [lax.index_in_dim(array, index, axis, keepdims=False) for index in range(array.shape[axis])]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _added_up(weights: Relaid, parts: Any, scales: Any, group_sums: Any, zero: Any) -> Any:
    """Float sums over the blocks, in the order of `dot.integer_matmul`: float32 `[c, r]`."""
    integers = block_integers(parts, weights.group_scales)
    lows = None
    if weights.group_minimums is not None:
        wide = group_sums.astype(jnp.int32)[:, :, None] * weights.group_minimums.astype(jnp.int32)
        lows = _added(wide, axis=2)
    sums = None if group_sums is None or lows is not None else group_sums[:, None]
    terms = block_terms(
        scales[:, None], weights.scale, integers, minimum=weights.minimum, lows=lows, sums=sums, zero=zero
    )
    chunks, blocks, rows = weights.scale.shape
    together = blocks_of_a_run(blocks)
    total = jnp.zeros((chunks, blocks // together, rows), jnp.float32)
    by_run = [term.reshape(chunks, blocks // together, together, rows) for term in terms]
    for block in range(together):
        for term in by_run:
            total = total + term[:, :, block]
    total = _added(total, axis=1)
    # XLA leaves out the addition to zero with which a sum begins, and with it that 0 + -0 is 0.
    return jnp.where(total == 0, jnp.float32(0), total)


def one_token_matmul(weights: Relaid, quantized: ActivationBlocks, group_sums: Any) -> Any:
    """Integer dots of all rows with one token's activations.

    Args:
        weights: re-laid, quantized.
        quantized: `[1, b, …]`.
        group_sums: of the activations, as the format's minimums need them, `[1, b]` or `[1, b, groups]`, or None.

    Returns:
        float32 `[1, rows]`.
    """
    zero = unknown_zero(quantized.codes)
    activations, scales = quantized.codes[0], quantized.scale[0]
    sums = None if group_sums is None else group_sums[0]

    def multiply(weights: Relaid) -> Any:
        parts = walled(part_sums, zero, weights, activations)
        return walled(lambda *operands: _added_up(*operands, zero=zero), zero, weights, parts, scales, sums)

    chunks, chunk_rows = weights.chunks, weights.chunk_rows
    together = max(1, min(chunks, _ELEMENTS_TOGETHER // (chunk_rows * weights.columns)))
    if together == chunks:
        return multiply(weights).reshape(1, -1)[:, : weights.rows]

    def body(index: Any, out: Any) -> Any:
        # The last piece may overlap the one before: the same values are written twice.
        start = jnp.minimum(index * together, chunks - together)
        piece = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, together), weights)
        return lax.dynamic_update_slice_in_dim(out, multiply(piece), start, axis=0)

    nothing = jnp.zeros((chunks, chunk_rows), jnp.float32)
    return lax.fori_loop(0, -(-chunks // together), body, nothing).reshape(1, -1)[:, : weights.rows]
