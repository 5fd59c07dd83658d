"""What the exact products share: sums of lanes, exact integer dots, and running over a matrix in pieces of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.relay import Relaid

LANES = 8
# Running sums of one piece of rows: 2^17 float32 are 512 KiB, half of a typical second-level cache.
_SUMS_TOGETHER = 1 << 17
# Decoded float32 weights of one piece: 2^22 are 16 MiB.
_WEIGHTS_TOGETHER = 1 << 22


def add_eight(lanes: Any) -> Any:
    """`hsum_float_8`: float32 `[8, …]` -> `[…]`."""
    four = lanes[4:8] + lanes[0:4]
    return add_four(four)


def add_four(lanes: Any) -> Any:
    """`hsum_float_4`: float32 `[4, …]` -> `[…]`."""
    two = lanes[0:2] + lanes[2:4]
    return two[0] + two[1]


def lane_dot(activations: Any, weights: Any) -> Any:
    """`[lanes, tokens, n]` by `[lanes, n, rows]`: exact integers, float32 `[lanes, tokens, rows]`."""
    # Even for n = 4 not a sum of products: fused into the multiply-add that takes it, that is four times slower.
    return lax.dot_general(activations, weights, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)


def _piece_rows(tokens: int, columns: int) -> int:
    """Rows whose sums and decoded weights stay small; a multiple of 64, for whole vectors."""
    rows = min(_SUMS_TOGETHER // (LANES * tokens), _WEIGHTS_TOGETHER // columns)
    return max(64, rows // 64 * 64)


def over_pieces(packed: Relaid, tokens: int, multiply: Any) -> Any:
    """Runs `multiply(piece: Relaid) -> [tokens, piece rows]` over all rows; `[tokens, rows]`."""
    size = min(_piece_rows(tokens, packed.columns), packed.chunk_rows)
    per_chunk = -(-packed.chunk_rows // size)

    def body(index: Any, out: Any) -> Any:
        # The last piece of a chunk may overlap the one before: the same values are written twice.
        chunk, start = index // per_chunk, jnp.minimum(index % per_chunk * size, packed.chunk_rows - size)

        def take(leaf: Any) -> Any:
            axis = leaf.ndim - (2 if packed.plain else 1)
            starts = [jnp.zeros_like(index)] * leaf.ndim
            starts[0], starts[axis] = chunk, start
            shape = (1, *leaf.shape[1:axis], size, *leaf.shape[axis + 1 :])
            return lax.dynamic_slice(leaf, starts, shape)[0]

        values = multiply(jax.tree.map(take, packed))
        return lax.dynamic_update_slice(out, values, (jnp.zeros_like(index), chunk * packed.chunk_rows + start))

    out = jnp.zeros((tokens, packed.chunks * packed.chunk_rows), jnp.float32)
    return lax.fori_loop(0, packed.chunks * per_chunk, body, out)[:, : packed.rows]
