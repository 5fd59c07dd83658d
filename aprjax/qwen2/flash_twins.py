"""Ggml's flash attention on a CPU, operation for operation, in NumPy: the specification of flash.py.

`ggml_compute_forward_flash_attn_ext_f16` (ggml-cpu/ops.cpp) has two kernels with a float16 cache:

- For fewer than 64 queries, `…_one_chunk`: the keys one by one, with the largest score so far subtracted. The queries
  are rounded to float16. The weighted values are kept in float16: rounded once per key (`ggml_vec_mad_f16`), and once
  more whenever the largest score grows (`ggml_vec_scale_f16`).
- From 64 queries on, `…_tiled`: 64 keys at a time, everything in float32, the queries as they are.

A single query that sees 512 cells or more is shared out among threads by keys, and then joined: its result depends
on their number, and is not followed here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from aprjax.blocks.default_twins import add_halves, wide_dot
from aprjax.blocks.float_twins import fused_multiply_add, vec_dot_f32
from aprjax.qwen2.twins import exponential

TILE = 64
_ONE = np.float32(1)
# glibc's expf: 2^(i/32) for i = 0 … 31 (each the double nearest to it), and a polynomial for 2^r, |r| <= 1/64.
POWERS = np.exp2(np.arange(32, dtype=np.longdouble) / 32).astype(np.float64)
POLYNOMIAL = tuple(
    float.fromhex(digits) / 32.0**power
    for digits, power in (("0x1.c6af84b912394p-5", 3), ("0x1.ebfce50fac4f3p-3", 2), ("0x1.62e42ff0c52d6p-1", 1))
)
PER_LOGARITHM = float.fromhex("0x1.71547652b82fep+0") * 32  # 32 / ln 2


def library_exponential(x: np.ndarray) -> np.ndarray:
    """Glibc's `expf` for x <= 0, its steps in double precision (sysdeps/ieee754/flt-32/e_expf.c)."""
    with np.errstate(invalid="ignore", under="ignore"):
        # Below -104 the result is zero; minus infinity stays finite in between.
        scaled = PER_LOGARITHM * np.maximum(x, np.float32(-110)).astype(np.float64)
        whole = np.rint(scaled)
        rest = scaled - whole
        cubic, square, linear = POLYNOMIAL
        value = (cubic * rest + square) * (rest * rest) + (linear * rest + 1)
        index = whole.astype(np.int64)
        return (value * np.ldexp(POWERS[index % 32], (index // 32).astype(np.int32))).astype(np.float32)


def flash_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, *, vectors: Literal["avx2", "avx512"] = "avx2"
) -> np.ndarray:
    """One sequence's attention.

    Args:
        q: float32 `[position, head, channel]`.
        k: float16 values as float32, `[key, kv_head, channel]`.
        v: likewise.
        visible: `[position, key]`; every position sees a key.
        vectors: the processor's.

    Returns:
        float32 `[position, head * channel]`.
    """
    positions, heads, channels = q.shape
    # [head, position, channel] and [head, key, channel].
    queries = q.transpose(1, 0, 2)
    keys, values = (np.repeat(side.transpose(1, 0, 2), heads // side.shape[1], axis=0) for side in (k, v))
    kernel = _one_by_one if positions < TILE else _tiled
    weighted, total = kernel(queries, keys, values, visible, 16 if vectors == "avx512" else 8)
    return (weighted * (_ONE / total)[..., None]).transpose(1, 0, 2).reshape(positions, heads * channels)


def _scale(channels: int) -> np.float32:
    return _ONE / np.sqrt(np.float32(channels))


def _through_half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _one_by_one(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted values' sums `[head, position, channel]`, and the weights' `[head, position]`."""
    dot = vec_dot_f32 if lanes == 8 else wide_dot
    q = _through_half(q)
    largest = np.full(q.shape[:2], -np.inf, np.float32)
    total, sums = np.zeros(q.shape[:2], np.float32), np.zeros(q.shape, np.float32)
    for key in range(k.shape[1]):
        seen = visible[None, :, key]
        score = dot(q, k[:, None, key]) * _scale(q.shape[-1])
        larger = score > largest
        shrink = np.where(larger, library_exponential(largest - score), _ONE)
        weight = np.where(larger, _ONE, library_exponential(np.minimum(score - largest, np.float32(0))))
        shrunk = _through_half(sums * shrink[..., None])
        added = _through_half(fused_multiply_add(v[:, None, key], weight[..., None], shrunk))
        sums = np.where(seen[..., None], added, sums)
        total = np.where(seen, fused_multiply_add(total, shrink, weight), total)
        largest = np.where(seen & larger, score, largest)
    return sums, total


def _tiled(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same, 64 keys at a time."""
    vectors = "avx2" if lanes == 8 else "avx512"
    scores = np.zeros((*q.shape[:2], k.shape[1]), np.float32)
    for channel in range(q.shape[-1]):
        scores = fused_multiply_add(k[:, None, :, channel], q[..., channel, None], scores)
    scores = np.where(visible[None], scores * _scale(q.shape[-1]), np.float32(-np.inf))
    missing = -k.shape[1] % TILE
    scores = np.pad(scores, ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf)
    v = np.pad(v, ((0, 0), (0, missing), (0, 0)))
    largest = np.full(q.shape[:2], -np.inf, np.float32)
    total, sums = np.zeros(q.shape[:2], np.float32), np.zeros((*q.shape[:2], v.shape[-1]), np.float32)
    for start in range(0, scores.shape[-1], TILE):
        tile = scores[..., start : start + TILE]
        new = np.maximum(largest, tile.max(axis=-1))
        live = tile.max(axis=-1) > -np.inf
        with np.errstate(invalid="ignore"):
            shrink = np.where(new > largest, library_exponential(largest - new), _ONE)
            weights = np.where(live[..., None], exponential(tile - new[..., None], vectors), np.float32(0))
        sums = sums * shrink[..., None]
        by_vector = add_halves(weights.reshape(*weights.shape[:-1], -1, lanes)).astype(np.float64)
        tile_sum = np.add.accumulate(by_vector, axis=-1)[..., -1]
        total = ((total * shrink).astype(np.float64) + tile_sum).astype(np.float32)
        for key in range(TILE):
            sums = fused_multiply_add(v[:, None, start + key], weights[..., key, None], sums)
        largest = np.where(live, new, largest)
    return sums, total
