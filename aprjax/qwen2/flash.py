"""Ggml's flash attention on a CPU with a float16 cache, to the bit, in JAX. flash_twins.py specifies it in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from aprjax.blocks.exact import exact_dot_f32
from aprjax.blocks.halves import through_half
from aprjax.qwen2.arithmetic import Vectors
from aprjax.qwen2.engine import add_halves, exponential_wide
from aprjax.qwen2.flash_twins import PER_LOGARITHM, POLYNOMIAL, POWERS, TILE
from aprjax.qwen2.rounding import fused, narrow, odd_sum, rounded, wide


def library_exponential(x: Any) -> Any:
    """Glibc's `expf` for float32 x <= 0."""
    with jax.enable_x64(True):
        scaled = PER_LOGARITHM * wide(jnp.maximum(x, jnp.float32(-110)))
        whole = jnp.round(scaled)
        rest = scaled - whole
        cubic, square, linear = POLYNOMIAL
        value = (cubic * rest + square) * (rest * rest) + (linear * rest + 1)
        index = lax.convert_element_type(whole, jnp.int32)
        power = jnp.asarray(POWERS)[index & 31]
        exponent = lax.convert_element_type(index >> 5, jnp.int64) << 52
        bits = lax.bitcast_convert_type(power, jnp.int64) + exponent
        return narrow(value * lax.bitcast_convert_type(bits, jnp.float64))


def flash_attention(
    q: Float[Array, "position head channel"],
    k: Float[Array, "key kv_head channel"],
    v: Float[Array, "key kv_head channel"],
    visible: Bool[Array, "position key"],
    vectors: Vectors = "avx2",
) -> Float[Array, "position width"]:
    """Heads merged; keys and values are float16 values. The kernel is that of as many queries as there are."""
    positions, heads, channels = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(positions, kv_heads, heads // kv_heads, channels).transpose(1, 2, 0, 3)
    # [kv_head, 1, key, channel]: the same for all heads that share them.
    keys, values = (side.transpose(1, 0, 2)[:, None] for side in (k, v))
    kernel = _one_by_one if positions < TILE else _tiled
    weighted, total = kernel(queries, keys, values, visible, vectors)
    merged = weighted * _quotient(jnp.float32(1), total)[..., None]
    return merged.transpose(2, 0, 1, 3).reshape(positions, heads * channels)


def _quotient(numerator: Any, denominator: Any) -> Any:
    with jax.enable_x64(True):
        return narrow(wide(numerator) / wide(denominator))


def _scale(channels: int) -> np.float32:
    return np.float32(1) / np.sqrt(np.float32(channels))


def _one_by_one(q: Array, k: Array, v: Array, visible: Array, vectors: Vectors) -> tuple[Array, Array]:
    """Sums of weighted values `[kv_head, group, position, channel]`, and of the weights, key after key."""
    lanes = 16 if vectors == "avx512" else 8
    scores = exact_dot_f32(through_half(q), k, lanes=lanes) * _scale(q.shape[-1])

    def add(carry: tuple[Array, Array, Array], step: tuple[Array, Array, Array]) -> tuple[Any, None]:
        largest, total, sums = carry
        score, value, seen = step
        larger = score > largest
        shrink = jnp.where(larger, library_exponential(largest - score), jnp.float32(1))
        weight = jnp.where(larger, jnp.float32(1), library_exponential(jnp.minimum(score - largest, 0)))
        shrunk = through_half(sums * shrink[..., None])
        added = through_half(fused(value[:, :, None], weight[..., None], shrunk))
        return (
            jnp.where(seen & larger, score, largest),
            jnp.where(seen, fused(total, shrink, weight), total),
            jnp.where(seen[:, None], added, sums),
        ), None

    nothing = jnp.zeros(q.shape[:3], jnp.float32)
    start = (jnp.full_like(nothing, -jnp.inf), nothing, jnp.zeros(q.shape, jnp.float32))
    steps = (jnp.moveaxis(scores, -1, 0), jnp.moveaxis(v, 2, 0), visible.T)
    (_, total, sums), _ = lax.scan(add, start, steps)
    return sums, total


def _tiled(q: Array, k: Array, v: Array, visible: Array, vectors: Vectors) -> tuple[Array, Array]:
    """The same, 64 keys at a time, in float32."""
    lanes = 16 if vectors == "avx512" else 8
    missing = -k.shape[2] % TILE
    k, v = (jnp.pad(side, ((0, 0), (0, 0), (0, missing), (0, 0))) for side in (k, v))
    visible = jnp.pad(visible, ((0, 0), (0, missing)))

    def multiply(sums: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        return fused(step[1][:, :, None], step[0][..., None], sums), None

    def add(carry: tuple[Array, Array, Array], step: tuple[Array, Array, Array]) -> tuple[Any, None]:
        largest, total, sums = carry
        key, value, seen = step
        by_channel = (jnp.moveaxis(q, -1, 0), jnp.moveaxis(key, -1, 0))
        start = jnp.zeros((*q.shape[:3], TILE), jnp.float32)
        scores = lax.scan(multiply, start, by_channel)[0] * _scale(q.shape[-1])
        scores = jnp.where(seen, scores, -jnp.inf)
        most = scores.max(axis=-1)
        new, live = jnp.maximum(largest, most), most > -jnp.inf
        shrink = jnp.where(new > largest, library_exponential(largest - new), jnp.float32(1))
        with jax.enable_x64(True):
            distance = jnp.where(seen, rounded(odd_sum(wide(scores), -wide(new)[..., None])), -jnp.inf)
            weights = jnp.where(seen, narrow(exponential_wide(distance, vectors)), jnp.float32(0))
            by_vector = wide(add_halves(weights.reshape(*weights.shape[:-1], -1, lanes)))
            tile_sum = by_vector[..., 0]
            for vector in range(1, TILE // lanes):
                tile_sum = tile_sum + by_vector[..., vector]
            total = narrow(rounded(wide(total) * wide(shrink)) + tile_sum)
        by_key = (jnp.moveaxis(weights, -1, 0), jnp.moveaxis(value, 2, 0))
        sums = lax.scan(multiply, sums * shrink[..., None], by_key)[0]
        return (jnp.where(live, new, largest), total, sums), None

    def by_tile(side: Array) -> Array:
        return jnp.moveaxis(side.reshape(*side.shape[:2], -1, TILE, side.shape[-1]), 2, 0)

    nothing = jnp.zeros(q.shape[:3], jnp.float32)
    start = (jnp.full_like(nothing, -jnp.inf), nothing, jnp.zeros(q.shape, jnp.float32))
    seen = jnp.moveaxis(visible.reshape(visible.shape[0], -1, TILE), 1, 0)
    (_, total, sums), _ = lax.scan(add, start, (by_tile(k), by_tile(v), seen))
    return sums, total
