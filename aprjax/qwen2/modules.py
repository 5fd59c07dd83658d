"""The modules of a Qwen2, in `flax.nnx`, used as plain pytrees under `jax.jit`.

Weights stay encoded: a `Linear` holds a `PackedWeight`, whose blocks are decoded, or multiplied as
integers, inside the jitted function. Every value of a stage passes through a `Tap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from aprjax.blocks.halves import through_half
from aprjax.blocks.relay import Relaid
from aprjax.checkpoint.types import RopePairing
from aprjax.qwen2 import kernels
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.sharding import Heads, SplitRelaid
from aprjax.qwen2.stages import Stage, Tap


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["shape"])
@dataclass(frozen=True)
class PackedWeight:
    """A matrix, still encoded, laid out for computing, on one device or over several; `shape` is `(out, in)`."""

    blocks: Relaid | SplitRelaid
    shape: tuple[int, int]

    @property
    def mesh(self) -> Mesh | None:
        """The devices that it is split over."""
        return self.blocks.mesh if isinstance(self.blocks, SplitRelaid) else None


def multiply(
    weight: PackedWeight, x: Float[Array, "position in"], arithmetic: Arithmetic, *, gathered: bool = True
) -> Float[Array, "position out"]:
    """`x W^T` as the arithmetic has it; `gathered` as in `sharding.split_product`."""
    columns = weight.blocks.columns
    if columns != weight.shape[1]:  # rows padded to whole blocks (apr-format.md 4.4): the padding multiplies zeros
        x = jnp.pad(x, ((0, 0), (0, columns - weight.shape[1])))
    return kernels.matmul(weight.blocks, x, arithmetic, gathered=gathered)


class Linear(nnx.Module):
    """`y = x W^T + b`, with `W` still encoded."""

    def __init__(self, weight: PackedWeight, bias: Float[Array, " out"] | None = None) -> None:
        self.weight = nnx.data(weight)
        self.bias = nnx.data(bias)

    def __call__(
        self, x: Float[Array, "position in"], arithmetic: Arithmetic, *, gathered: bool = True
    ) -> Float[Array, "position out"]:
        """The product alone; the bias is a stage of its own."""
        return multiply(self.weight, x, arithmetic, gathered=gathered)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv:1910.07467)."""

    def __init__(self, weight: Float[Array, " hidden"], eps: Float[Array, ""]) -> None:
        self.weight = nnx.data(weight)
        self.eps = nnx.data(eps)

    def __call__(self, x: Float[Array, "position hidden"], arithmetic: Arithmetic) -> Float[Array, "position hidden"]:
        """Normalised and scaled `x`."""
        return kernels.rms_norm(x, self.weight, self.eps, arithmetic)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (arXiv:2305.13245, arXiv:2104.09864)."""

    def __init__(
        self,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_pairing: RopePairing,
    ) -> None:
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_pairing: RopePairing = rope_pairing

    def __call__(
        self,
        x: Float[Array, "position hidden"],
        context: Context,
        arithmetic: Arithmetic,
        tap: Tap,
    ) -> tuple[Float[Array, "position hidden"], tuple[Array, Array]]:
        """The attention's output, and the keys and values `[key, kv_head, channel]` including these positions."""
        positions = x.shape[0]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        with jax.named_scope(Stage.QKV_MATMUL):
            qkv = tap(Stage.QKV_MATMUL, jnp.concatenate([p(x, arithmetic) for p in projections], axis=-1))
        with jax.named_scope(Stage.QKV_BIAS):
            biases = [jnp.zeros(p.weight.shape[0], x.dtype) if p.bias is None else p.bias for p in projections]
            qkv = tap(Stage.QKV_BIAS, kernels.add(qkv, jnp.concatenate(biases).astype(x.dtype), arithmetic))
        widths = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim)
        q, k, v = jnp.split(qkv, (widths[0], widths[0] + widths[1]), axis=-1)
        with jax.named_scope(Stage.Q_POST_ROPE):
            q = self._rotate(q.reshape(positions, -1, self.head_dim), context, arithmetic)
            q = tap(Stage.Q_POST_ROPE, q.reshape(positions, -1)).reshape(q.shape)
        with jax.named_scope(Stage.K_POST_ROPE):
            k = self._rotate(k.reshape(positions, -1, self.head_dim), context, arithmetic)
            k = tap(Stage.K_POST_ROPE, k.reshape(positions, -1)).reshape(k.shape)
        v = v.reshape(positions, -1, self.head_dim)
        half = arithmetic.kv_cache == "float16"
        if half:
            k, v = through_half(k), through_half(v)
        cached = (context.visible, context.keys, context.values, context.start)
        heads = Heads(self.q_proj.weight.mesh, self.num_heads, self.num_kv_heads)
        if context.sequences is None:
            attended, k, v = _attend((q, k, v), cached, arithmetic, tap, heads)
        else:
            # Only the attention tells sequences apart: everything else is one product for all of them.
            apart = (context.sequences, positions // context.sequences)
            split = (q.reshape(*apart, *q.shape[1:]), k.reshape(*apart, *k.shape[1:]), v.reshape(*apart, *v.shape[1:]))
            attended, k, v = jax.vmap(partial(_attend, arithmetic=arithmetic, tap=Tap(), heads=heads))(split, cached)
            attended = attended.reshape(positions, -1)
        with jax.named_scope(Stage.ATTENTION):
            merged = tap(Stage.ATTENTION, attended)
        with jax.named_scope(Stage.ATTN_OUT):
            return tap(Stage.ATTN_OUT, self.o_proj(merged, arithmetic)), (k, v)

    def _rotate(self, x: Array, context: Context, arithmetic: Arithmetic) -> Array:
        return kernels.rotate(x, context.cos, context.sin, self.rope_pairing, arithmetic)


def _attend(
    qkv: tuple[Array, Array, Array],
    cached: tuple[Array, Array | None, Array | None, Array | int],
    arithmetic: Arithmetic,
    tap: Tap,
    heads: Heads,
) -> tuple[Float[Array, "position width"], Array, Array]:
    """One sequence's attention, heads merged, and its keys and values including the cached ones.

    `qkv` are `[position, head, channel]`; `cached` are a `Context`'s `visible`, `keys`, `values` and `start`.
    """
    (q, k, v), (visible, keys, values, start) = qkv, cached
    half = arithmetic.kv_cache == "float16"
    if keys is not None and values is not None:
        k = jax.lax.dynamic_update_slice_in_dim(keys, k, start, axis=0)
        v = jax.lax.dynamic_update_slice_in_dim(values, v, start, axis=0)
    k, v = heads.cached(k), heads.cached(v)
    with jax.named_scope(Stage.ATTN_SCORES):
        scores = heads.scores(
            partial(kernels.attention_scores, arithmetic=arithmetic), through_half(q) if half else q, k
        )
        scores = _by_position(tap, Stage.ATTN_SCORES, scores)
    with jax.named_scope(Stage.ATTN_SOFTMAX):
        probabilities = heads.softmax(partial(kernels.masked_softmax, arithmetic=arithmetic), scores, visible)
        probabilities = _by_position(tap, Stage.ATTN_SOFTMAX, probabilities)
    with jax.named_scope(Stage.ATTENTION):
        if arithmetic.flash:
            # One kernel, which has no such scores and probabilities: what passed the tap is for reading.
            return heads.flash(partial(kernels.flash_attention, arithmetic=arithmetic), q, k, v, visible), k, v
        weights = through_half(probabilities) if half else probabilities
        return heads.values(partial(kernels.weighted_values, arithmetic=arithmetic), weights, v), k, v


def _by_position(tap: Tap, stage: Stage, x: Float[Array, "head position key"]) -> Float[Array, "head position key"]:
    """Taps `[head, position, key]` in the form every stage has: `[position, head * key]`."""
    heads, positions, keys = x.shape
    tapped = tap(stage, x.transpose(1, 0, 2).reshape(positions, heads * keys))
    return tapped.reshape(positions, heads, keys).transpose(1, 0, 2)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear) -> None:
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def __call__(
        self, x: Float[Array, "position hidden"], arithmetic: Arithmetic, tap: Tap
    ) -> Float[Array, "position hidden"]:
        """The block's output, before the residual."""
        with jax.named_scope(Stage.FFN_GATE):
            # Over several devices the neurons stay where they were computed until `down` needs all of them.
            gate = tap(Stage.FFN_GATE, self.gate_proj(x, arithmetic, gathered=False))
        with jax.named_scope(Stage.FFN_UP):
            up = tap(Stage.FFN_UP, self.up_proj(x, arithmetic, gathered=False))
        with jax.named_scope(Stage.FFN_SILU):
            activated = tap(Stage.FFN_SILU, kernels.silu(gate, arithmetic))
        with jax.named_scope(Stage.FFN_SWIGL):
            inner = tap(Stage.FFN_SWIGL, kernels.multiply(activated, up, arithmetic))
        with jax.named_scope(Stage.FFN_OUT):
            return tap(Stage.FFN_OUT, self.down_proj(inner, arithmetic))


class DecoderLayer(nnx.Module):
    """One layer, the unit of compilation: norm, attention, residual, norm, feed-forward, residual."""

    def __init__(
        self,
        input_layernorm: RMSNorm,
        self_attn: Attention,
        post_attention_layernorm: RMSNorm,
        mlp: FeedForward,
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def __call__(
        self, hidden: Float[Array, "position hidden"], context: Context, arithmetic: Arithmetic, tap: Tap
    ) -> tuple[Float[Array, "position hidden"], tuple[Array, Array]]:
        """The layer's output, and its keys and values."""
        with jax.named_scope(Stage.ATTN_NORM):
            x = tap(Stage.ATTN_NORM, self.input_layernorm(hidden, arithmetic))
        attended, cache = self.self_attn(x, context, arithmetic, tap)
        with jax.named_scope(Stage.POST_ATTN_RESIDUAL):
            hidden = tap(Stage.POST_ATTN_RESIDUAL, kernels.add(attended, hidden, arithmetic))
        with jax.named_scope(Stage.FFN_NORM):
            x = tap(Stage.FFN_NORM, self.post_attention_layernorm(hidden, arithmetic))
        transformed = self.mlp(x, arithmetic, tap)
        with jax.named_scope(Stage.POST_FFN_RESIDUAL):
            return tap(Stage.POST_FFN_RESIDUAL, kernels.add(transformed, hidden, arithmetic)), cache


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cos", "sin", "visible", "keys", "values", "start"],
    meta_fields=["sequences"],
)
@dataclass(frozen=True)
class Context:
    """What a layer needs to know of positions: rotation tables, the causal mask, and an optional cache.

    `keys` and `values` are one layer's cache `[capacity, kv_head, channel]`; `start` is the row at
    which these positions are written. Without a cache the keys are those of the positions themselves.

    With `sequences` the positions are those of so many sequences, as many of each, one after the other; `visible`,
    `keys`, `values` and `start` then have a first axis of that length, and a tap sees no scores and probabilities.
    """

    cos: Float[Array, "position half"]
    sin: Float[Array, "position half"]
    visible: Bool[Array, "position key"]
    keys: Float[Array, "capacity kv_head channel"] | None = None
    values: Float[Array, "capacity kv_head channel"] | None = None
    start: Array | int = 0
    sequences: int | None = None
