"""What the engines' kernels between the matrix products compute, operation for operation, in NumPy.

The specification of engine.py (llama.cpp's plain AVX2 build) and realizar.py; the products have theirs in
`aprjax.blocks.twins`. Every function takes float32 and returns float32; each line rounds where it seems to.
They go through sums one by one: they explain and check, and are not what runs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from aprjax.blocks.activations import ActivationBlocks
from aprjax.blocks.float_twins import fused_multiply_add, vec_dot_f32
from aprjax.blocks.twins import dot_of_blocks, running_lanes

_ONE = np.float32(1)


def _hex(digits: str) -> np.ndarray:
    return np.asarray(float.fromhex(digits), np.float32)


def _running_sum(values: np.ndarray) -> np.ndarray:
    """One accumulator over the last axis, in the type of the values."""
    return np.add.accumulate(values, axis=-1)[..., -1]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`ggml_compute_forward_rms_norm`, then the multiplication by the weight: `[…, n]`."""
    total = _running_sum((x * x).astype(np.float64))
    mean = (total / x.shape[-1]).astype(np.float32)
    scale = _ONE / np.sqrt(mean + np.float32(eps))
    return (x * scale[..., None]) * weight


def rotate(
    first: np.ndarray, second: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotation: Literal["fused", "separate"]
) -> tuple[np.ndarray, np.ndarray]:
    """One channel of each pair and the other, turned: ggml's rope as gcc contracts it, or without FMA."""
    if rotation == "fused":
        return fused_multiply_add(first, cos, -(second * sin)), fused_multiply_add(first, sin, second * cos)
    return first * cos - second * sin, first * sin + second * cos


def exponential(x: np.ndarray, vectors: Literal["avx2", "avx512"] = "avx2") -> np.ndarray:
    """`ggml_v_expf`: x = n ln 2 + b, and 2^n (1 + b + b^2/2 …).

    With AVX-512 the 1 is part of the polynomial, and one instruction (`scalef`) multiplies by 2^n.
    """
    shift = _hex("0x1.8p23")
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        x = np.clip(x, np.float32(-200), np.float32(200))  # ggml's integers wrap beyond; the result is 0 or infinity
        n = fused_multiply_add(x, _hex("0x1.715476p0"), shift) - shift
        b = fused_multiply_add(-n, _hex("0x1.7f7d1cp-20"), fused_multiply_add(-n, _hex("0x1.62e4p-1"), x))
        u = b * b
        outer = fused_multiply_add(_hex("0x1.0e4020p-7"), b, _hex("0x1.573e2ep-5"))
        inner = fused_multiply_add(_hex("0x1.555e66p-3"), b, _hex("0x1.fffdb6p-2"))
        beyond = np.where(n > 0, np.float32(np.inf), np.float32(0))
        distance = np.abs(n)
        if vectors == "avx512":
            straight = fused_multiply_add(_hex("0x1.ffffecp-1"), b, _ONE)
            value = fused_multiply_add(fused_multiply_add(outer, u, inner), u, straight)
            return np.where(distance > 192, beyond, np.ldexp(value, n.astype(np.int32)))
        polynomial = fused_multiply_add(fused_multiply_add(outer, u, inner), u, _hex("0x1.ffffecp-1") * b)
        power = np.ldexp(_ONE, n.astype(np.int32))
        near = fused_multiply_add(power, polynomial, power)
        # Beyond 2^126 in two steps: a number that float32 surely holds, then the rest of the power.
        rest = np.where(n > 0, np.float32(2.0**127), np.float32(2.0**-125))
        part = np.ldexp(_ONE, n.astype(np.int32) - np.where(n > 0, 127, -125).astype(np.int32))
        far = fused_multiply_add(part, polynomial, part) * rest
        return np.where(distance > 192, beyond, np.where(distance > 126, far, near))


def silu(x: np.ndarray) -> np.ndarray:
    """The first half of `ggml_vec_swiglu_f32`; the other is a multiplication."""
    return x / (_ONE + exponential(-x))


def softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """`ggml_compute_forward_soft_max` of scaled scores `[…, n]`, n a multiple of 8."""
    largest = np.max(np.where(visible, scores, -np.inf), axis=-1, keepdims=True).astype(np.float32)
    exponentials = np.where(visible, exponential(np.where(visible, scores, largest) - largest), np.float32(0))
    lanes = exponentials.reshape(*exponentials.shape[:-1], -1, 8)
    lanes = lanes[..., 4:] + lanes[..., :4]
    lanes = lanes[..., 2:] + lanes[..., :2]
    total = _running_sum((lanes[..., 1] + lanes[..., 0]).astype(np.float64))
    return exponentials * (1 / total).astype(np.float32)[..., None]


def attention_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """`kq` and its scale: `[position, channel]` of one head by `[key, channel]` -> `[position, key]`."""
    return vec_dot_f32(q[:, None], k[None]) * (_ONE / np.sqrt(np.float32(q.shape[-1])))


def weighted_values(probabilities: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`kqv`: `[position, key]` by `[key, channel]` of one head -> `[position, channel]`; keys a multiple of 32."""
    return vec_dot_f32(probabilities[:, None], np.ascontiguousarray(v.T)[None])


def realizar_blocks(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Realizar's activation blocks: codes int8 `[…, n / size, size]`, float32 scales."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    largest = np.abs(blocks).max(axis=-1)
    scale = np.where(largest > 0, largest, _ONE) / np.float32(127)
    scaled = blocks * (_ONE / scale)[..., None]
    # Exact in float64; ties go away from zero.
    nearest = np.copysign(np.floor(np.abs(scaled).astype(np.float64) + 0.5), scaled)
    return np.clip(nearest, -128, 127).astype(np.int8), scale


def realizar_dot(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Realizar's integer dots of rows, `[…, width]` -> `[…]`: Q4_K as ggml's, Q4_0 and Q8_0 added by `hadd`."""
    codes, scale = realizar_blocks(x, 256 if name == "Q4_K" else 32)
    if name == "Q4_K":
        sums = codes.reshape(*codes.shape[:-1], 16, 16).sum(axis=-1, dtype=np.int16)
        return dot_of_blocks(name, packed, ActivationBlocks(codes, scale, sums))
    lanes = running_lanes(name, packed, ActivationBlocks(codes, scale))
    four = lanes[..., :4] + lanes[..., 4:]
    return (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])


def realizar_norm_sequential(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Apr's traced path: one float32 accumulator, a division by the root."""
    root = np.sqrt(_running_sum(x * x) / np.float32(x.shape[-1]) + np.float32(eps))
    return x / root[..., None] * weight


def realizar_norm_lanes(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Trueno's AVX2 sum of squares: 4 accumulators of 8 lanes; n a multiple of 32."""
    sums = np.zeros((*x.shape[:-1], 32), np.float32)
    for start in range(0, x.shape[-1], 32):
        part = x[..., start : start + 32]
        sums = fused_multiply_add(part, part, sums)
    by_register = sums.reshape(*sums.shape[:-1], 4, 8)
    lanes = (by_register[..., 0, :] + by_register[..., 1, :]) + (by_register[..., 2, :] + by_register[..., 3, :])
    lanes = lanes[..., :4] + lanes[..., 4:]
    lanes = lanes[..., :2] + lanes[..., 2:]
    root = np.sqrt((lanes[..., 0] + lanes[..., 1]) / np.float32(x.shape[-1]) + np.float32(eps))
    return x * (_ONE / root)[..., None] * weight


def realizar_softmax(exponentials: np.ndarray) -> np.ndarray:
    """From the exponentials (libm's) on: one float32 accumulator and a multiplication by its inverse."""
    return exponentials * (_ONE / _running_sum(exponentials))[..., None]
