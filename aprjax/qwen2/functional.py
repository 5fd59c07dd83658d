"""The paper's equations as pure functions: RMSNorm, rotary embedding, grouped attention, SwiGLU.

Sources: RMSNorm arXiv:1910.07467; rotary embedding arXiv:2104.09864; grouped-query attention
arXiv:2305.13245; SwiGLU arXiv:2002.05202; their composition arXiv:2407.10671 (Qwen2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aprjax.checkpoint.types import RopePairing

# float32 matrix products must not drop to bfloat16 or TF32 where a platform would by default.
HIGHEST = jax.lax.Precision.HIGHEST


def rms_norm(
    x: Float[Array, "position hidden"], weight: Float[Array, " hidden"], eps: Float[Array, ""] | float
) -> Float[Array, "position hidden"]:
    """`x / sqrt(mean(x^2) + eps) * weight`."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + jnp.asarray(eps, x.dtype)) * weight.astype(x.dtype)


def rotate(
    x: Float[Array, "position head channel"],
    cos: Float[Array, "position half"],
    sin: Float[Array, "position half"],
    pairing: RopePairing,
) -> Float[Array, "position head channel"]:
    """Rotates channel pairs by the position's angles.

    `neox` pairs channel i with i + channels/2 (Qwen2), `norm` pairs 2i with 2i + 1.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    if pairing == "neox":
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)


def attention_scores(
    q: Float[Array, "position head channel"], k: Float[Array, "key kv_head channel"]
) -> Float[Array, "head position key"]:
    """`q k^T / sqrt(channels)`; `head / kv_head` query heads share one key head."""
    positions, heads, channels = q.shape
    kv_heads = k.shape[1]
    # One matrix product per key head, laid out by hand. As an einsum over "tkgd,skd" XLA's CPU backend takes another
    # kernel: slower by half at 1024 positions, and a score matrix of the 1.5B is 2.9e-7 from exact instead of 1.9e-7.
    queries = jnp.swapaxes(q, 0, 1).reshape(kv_heads, heads // kv_heads * positions, channels)
    scores = jnp.matmul(queries, k.transpose(1, 2, 0), precision=HIGHEST, preferred_element_type=q.dtype)
    return scores.reshape(heads, positions, k.shape[0]) * jnp.asarray(channels**-0.5, q.dtype)


def masked_softmax(
    scores: Float[Array, "head position key"], visible: Bool[Array, "position key"]
) -> Float[Array, "head position key"]:
    """Softmax over the visible keys; the others get exactly zero."""
    scores = jnp.where(visible[None], scores, -jnp.inf)
    exponentials = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)


def weighted_values(
    probabilities: Float[Array, "head position key"], v: Float[Array, "key kv_head channel"]
) -> Float[Array, "position width"]:
    """`softmax V`, heads merged into `head * channel`."""
    heads, positions, keys = probabilities.shape
    kv_heads, channels = v.shape[1], v.shape[2]
    grouped = probabilities.reshape(kv_heads, heads // kv_heads, positions, keys)
    values = jnp.einsum("kgts,skd->tkgd", grouped, v, precision=HIGHEST, preferred_element_type=probabilities.dtype)
    return values.reshape(positions, heads * channels)


def silu(x: Float[Array, "position width"]) -> Float[Array, "position width"]:
    """`x * sigmoid(x)`."""
    return x / (1 + jnp.exp(-x))
