"""The elementwise and summing kernels of llama.cpp's CPU graph, as its plain AVX2 build rounds them, or AVX-512.

ggml functions: `ggml_compute_forward_rms_norm`, `…_rope` (NEOX and NORM), `…_soft_max`, `ggml_v_expf`,
`ggml_vec_swiglu_f32`, `ggml_vec_dot_f32` (kernels.md sections 3.2 and 4). tests/qwen2/twins.py specifies each in
NumPy. Results are the engine's to the bit where `exact` says so. Otherwise sums are re-associated, and the
exponential is the engine's polynomial as XLA compiles it. Matrix products with weights are in `aprjax.blocks`.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from aprjax.blocks.exact import exact_dot_f32
from aprjax.checkpoint.types import RopePairing
from aprjax.qwen2.arithmetic import Vectors
from aprjax.qwen2.rounding import added, fused, fused_wide, narrow, odd_sum, rounded, rounded_with_subnormals, wide

# Lanes of one AVX2 vector of float32.
LANES = 8


def rms_norm(x: Float[Array, "position hidden"], weight: Array, eps: Any, *, exact: bool) -> Array:
    """Squares rounded to float32, summed in double precision (one after the other if `exact`)."""
    with jax.enable_x64(True):
        squares = rounded_with_subnormals(wide(x) * wide(x))
        if exact:
            total = lax.scan(lambda sum_, column: (sum_ + column, None), jnp.zeros_like(squares[:, 0]), squares.T)[0]
        else:
            total = jnp.sum(squares, axis=-1)
        # A barrier around the constant: XLA would multiply by its rounded inverse.
        mean = narrow(total / lax.optimization_barrier(jnp.float64(x.shape[-1])))[:, None]
        root = jnp.sqrt(added(mean, jnp.asarray(eps, jnp.float32)))
        # In float64, rounded: a float32 division by a square root becomes XLA's inverse square root.
        scale = narrow(1 / wide(root))
    return (x * scale) * weight.astype(jnp.float32)


def rotate(
    x: Float[Array, "position head channel"],
    cos: Float[Array, "position half"],
    sin: Float[Array, "position half"],
    pairing: RopePairing,
    rotation: Literal["fused", "separate"],
) -> Float[Array, "position head channel"]:
    """`functional.rotate` with the roundings of `Arithmetic.rotation`."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x, 2, axis=-1) if pairing == "neox" else (x[..., 0::2], x[..., 1::2])
    if rotation == "fused":
        rotated = fused(first, cos, -(second * sin)), fused(first, sin, second * cos)
    else:
        rotated = added(first * cos, -(second * sin)), added(first * sin, second * cos)
    if pairing == "neox":
        return jnp.concatenate(rotated, axis=-1)
    return jnp.stack(rotated, axis=-1).reshape(x.shape)


def exponential_wide(x: Any, vectors: Vectors = "avx2") -> Any:
    """`ggml_v_expf` of wide `x`, as a wide value, subnormals included.

    A polynomial of degree five after Cody-Waite reduction, at most 1.95 units in the last place off (ggml). With
    AVX-512 the 1 is part of the polynomial, and the power of two is applied by an instruction of its own.
    """
    with jax.enable_x64(True):
        # Beyond these the result is 0 or infinity, and the exponent's bits would run over.
        x = jnp.clip(x, -200.0, 200.0)
        # Adding 1.5 * 2^23 rounds to a whole number.
        exponent = fused_wide(x, _hex("0x1.715476p0"), _hex("0x1.8p23")) - _hex("0x1.8p23")
        b = fused_wide(-exponent, _hex("0x1.7f7d1cp-20"), fused_wide(-exponent, _hex("0x1.62e4p-1"), x))
        u = rounded(b * b)
        outer = fused_wide(_hex("0x1.0e4020p-7"), b, _hex("0x1.573e2ep-5"))
        inner = fused_wide(_hex("0x1.555e66p-3"), b, _hex("0x1.fffdb6p-2"))
        distance = jnp.abs(exponent)
        if vectors == "avx512":
            straight = fused_wide(_hex("0x1.ffffecp-1"), b, jnp.float64(1))
            scaled = fused_wide(fused_wide(outer, u, inner), u, straight) * _power_of_two(exponent)
        else:
            polynomial = fused_wide(fused_wide(outer, u, inner), u, rounded(_hex("0x1.ffffecp-1") * b))
            once = odd_sum(polynomial, 1.0)
            # Far from zero ggml scales in two steps, so that a subnormal result is rounded twice.
            scaled = jnp.where(distance > 126, rounded(once), once) * _power_of_two(exponent)
        limit = jnp.where(exponent > 0, jnp.inf, 0.0)
        return jnp.where(distance > 192, limit, rounded_with_subnormals(scaled))


def exponential(x: Any) -> Any:
    """`ggml_v_expf`'s polynomial in float32, rounded as the compiler has it; subnormal results may be zero."""
    # Beyond 104 the result is 0 or infinity, and up to 174 both halves of the power of two are normal numbers.
    x = jnp.clip(x, -128, 128)
    exponent = jnp.round(x * _single("0x1.715476p0"))
    # The first constant has so few bits that its product is exact: this needs no fused multiply-add.
    b = (x - exponent * _single("0x1.62e4p-1")) - exponent * _single("0x1.7f7d1cp-20")
    outer = _single("0x1.0e4020p-7") * b + _single("0x1.573e2ep-5")
    inner = _single("0x1.555e66p-3") * b + _single("0x1.fffdb6p-2")
    power = 1 + ((outer * (b * b) + inner) * (b * b) + _single("0x1.ffffecp-1") * b)
    whole = exponent.astype(jnp.int32)
    half = whole >> 1
    for part in (half, whole - half):
        power = power * lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
    return power


def _single(digits: str) -> np.float32:
    return np.float32(float.fromhex(digits))


def _hex(digits: str) -> Any:
    return jnp.float64(float.fromhex(digits))


def _power_of_two(exponent: Any) -> Any:
    """2^exponent in float64, for whole numbers from -1022 to 1023."""
    # Added to 1.5 * 2^52, a whole number is the lowest bits of the sum.
    bits = lax.bitcast_convert_type(exponent + _hex("0x1.8p52"), jnp.int64)
    return lax.bitcast_convert_type((bits + 1023) << 52, jnp.float64)


def silu(x: Float[Array, "position width"], vectors: Vectors = "avx2") -> Float[Array, "position width"]:
    """`x / (1 + ggml_v_expf(-x))`."""
    with jax.enable_x64(True):
        # The float64 sum is exact where it matters: an exponential below 2^-29 or above 2^53 leaves
        # the larger of the two as it is. Nothing here is a float32 product that XLA could fuse.
        return x / narrow(1.0 + exponential_wide(wide(-x), vectors))


def silu_compiled(x: Float[Array, "position width"]) -> Float[Array, "position width"]:
    """`silu` by `exponential`."""
    return x / (1 + exponential(-x))


def softmax_compiled(
    scores: Float[Array, "head position key"], visible: Bool[Array, "position key"], exponential: Any
) -> Float[Array, "head position key"]:
    """`softmax` with sums in any order; `exponential` takes and gives float32."""
    hidden = jnp.where(visible[None], scores, -jnp.inf)
    exponentials = exponential(hidden - jnp.max(hidden, axis=-1, keepdims=True))
    with jax.enable_x64(True):
        total = jnp.sum(wide(exponentials), axis=-1, keepdims=True)
        return exponentials * narrow(jnp.float64(1) / total)


def softmax(
    scores: Float[Array, "head position key"],
    visible: Bool[Array, "position key"],
    exponential: Any,
    *,
    lanes: int = LANES,
) -> Float[Array, "head position key"]:
    """Double sum of the float32 sums of 8 or 16 neighbours; `exponential` takes and gives wide values (`rounding`)."""
    visible = visible[None]
    hidden = jnp.where(visible, scores, -jnp.inf)
    largest = jnp.max(hidden, axis=-1, keepdims=True)
    with jax.enable_x64(True):
        exponentials = jnp.where(visible, exponential(rounded(odd_sum(wide(scores), -wide(largest)))), jnp.float64(0))
        vectors = padded(narrow(exponentials), lanes)
        sums = wide(add_halves(vectors.reshape(*vectors.shape[:-1], -1, lanes)))
        by_vector = jnp.moveaxis(sums, -1, 0)
        total = lax.scan(lambda sum_, part: (sum_ + part, None), jnp.zeros_like(by_vector[0]), by_vector)[0]
        inverse = narrow(jnp.float64(1) / total)[..., None]
        return narrow(exponentials * wide(inverse))


def add_halves(lanes: Any) -> Any:
    """The upper half added to the lower one until one number is left: `[…, 2^n]` -> `[…]`."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., half:] + lanes[..., :half]
    return lanes[..., 0]


def padded(x: Any, multiple: int) -> Any:
    """Zeros appended to the last axis up to a multiple.

    ggml pads the keys to a multiple of 256; beyond a multiple of a kernel's step zeros change no bit.
    """
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def attention_scores(
    q: Float[Array, "position head channel"],
    k: Float[Array, "key kv_head channel"],
    registers: int = 4,
    lanes: int = LANES,
) -> Float[Array, "head position key"]:
    """`ggml_vec_dot_f32` (or tinyBLAS) of every query and key, then the scale, as its own rounding."""
    positions, heads, channels = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(positions, kv_heads, heads // kv_heads, channels).transpose(1, 2, 0, 3)
    scores = exact_dot_f32(grouped, k.transpose(1, 0, 2)[:, None], registers, lanes)
    scale = np.float32(1) / np.sqrt(np.float32(channels))
    return scores.reshape(heads, positions, k.shape[0]) * scale


def weighted_values(
    probabilities: Float[Array, "head position key"],
    v: Float[Array, "key kv_head channel"],
    registers: int = 4,
    lanes: int = LANES,
) -> Float[Array, "position width"]:
    """`ggml_vec_dot_f32` (or tinyBLAS) of every row of probabilities and every channel of the values; heads merged."""
    heads, positions, keys = probabilities.shape
    kv_heads, channels = v.shape[1], v.shape[2]
    step = registers * lanes
    grouped = padded(probabilities.reshape(kv_heads, heads // kv_heads, positions, keys), step)
    values = exact_dot_f32(grouped, padded(v.transpose(1, 2, 0), step)[:, None], registers, lanes)
    return values.transpose(2, 0, 1, 3).reshape(positions, heads * channels)
