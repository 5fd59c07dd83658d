"""The nodes of a forward pass between its matrix products, in float64, with every choice of a `Variant`.

One source for NumPy (values: no compilation for hundreds of proposals) and jax (derivatives), told apart by `xp`.
float64 has none of an engine's rounding, so a right proposal comes as near to a trace as the trace is to the
truth: what the floors measure. Sources of the equations: `aprjax.qwen2.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.explain.variant import Exponential, Rounding, Variant
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

_INVERSE_LN2 = 1.4426950408889634
# Schraudolph's exponential (Neural Computation 11, 1999): a shifted exponent, with the offset of least rms error
# (C = 60801 of 2^20).
_SCHRAUDOLPH_OFFSET = 60801 / 2**20
# (1 + x/n)^n, the limit that fast kernels take with n = 2^10.
_LIMIT_POWER = 1024


@dataclass(frozen=True)
class NodeContext:
    """What a node needs besides its inputs.

    Attributes:
        xp: numpy, or jax.numpy inside a traced function.
        config: of the file.
        half: whether the arithmetic rounds keys and values to float16.
        norm: weight of the stage's own norm.
        other_norm: weight of the layer's other norm (of the final norm: the last layer's).
        bias: those of q, k and v, one after the other.
    """

    xp: Any
    config: ModelConfig
    half: bool
    norm: Any = None
    other_norm: Any = None
    bias: Any = None


def rounded(x: Any, kind: Rounding | None, xp: Any) -> Any:
    """`x` rounded and back in float64. A derivative passes through as if nothing were rounded."""
    if kind is None or xp is not np:
        return x
    if kind == "q8_0":
        return _q8_0(x)
    if kind == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float32).astype(np.float16).astype(np.float64)
    import ml_dtypes

    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 neighbours of the last axis with a float16 scale (ggml's `quantize_row_q8_0`)."""
    if x.shape[-1] % 32:
        return x
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale.astype(np.float16)).reshape(x.shape).astype(np.float64)


def norm(x: Any, variant: Variant, here: NodeContext) -> Float[Any, "position hidden"]:
    """RMSNorm, or what was made of it."""
    xp = here.xp
    eps = here.config.rms_norm_eps if variant.eps is None else variant.eps
    weight = {
        "own": here.norm,
        "plus one": here.norm + 1,
        "none": xp.ones_like(here.norm),
        "other norm's": here.norm if here.other_norm is None else here.other_norm,
    }[variant.norm_weight]
    if variant.norms == 0:
        return x
    for _ in range(variant.norms):
        if variant.norm == "none":
            x = x * weight
            continue
        if variant.norm == "mean-subtracting":
            x = x - xp.mean(x, axis=-1, keepdims=True)
        square = xp.mean(x * x, axis=-1, keepdims=True)
        root = xp.sqrt(square) + eps if variant.eps_outside else xp.sqrt(square + eps)
        x = x / root * weight
    return x


def add_bias(qkv: Any, variant: Variant, here: NodeContext) -> Float[Any, "position qkv"]:
    """`qkv` with a factor on each projection's bias."""
    config = here.config
    widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    parts, begin = [], 0
    for factor, heads in zip(variant.bias, widths, strict=True):
        end = begin + heads * config.head_dim
        parts.append(here.bias[begin:end] * factor)
        begin = end
    return qkv + here.xp.concatenate(parts)


def split_qkv(qkv: Any, config: ModelConfig) -> tuple[Any, Any, Any]:
    """q, k and v as `[position, head, channel]`."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    by_head = (qkv.shape[0], -1, config.head_dim)
    return qkv[:, :q].reshape(by_head), qkv[:, q : q + kv].reshape(by_head), qkv[:, q + kv :].reshape(by_head)


def rotate(x: Any, which: str, positions: Any, variant: Variant, here: NodeContext) -> Float[Any, "position width"]:
    """Rotary embedding of `[position, head, channel]`, heads merged; `which` is "q" or "k"."""
    xp, config = here.xp, here.config
    flat = (x.shape[0], x.shape[1] * x.shape[2])
    if which not in variant.rotated:
        return x.reshape(flat)
    width = config.head_dim if variant.rope_width is None else variant.rope_width
    theta = config.rope_theta if variant.theta is None else variant.theta
    exponents = -2.0 * np.arange(width // 2, dtype=np.float64) / width
    places = (np.asarray(positions, np.float64) + variant.offset)[:, None] * variant.stretch
    angles = places * xp.exp(exponents * xp.log(xp.asarray(theta, dtype=xp.float64)))
    cos = xp.cos(angles)[:, None]
    sin = (-xp.sin(angles) if variant.backwards else xp.sin(angles))[:, None]
    turned, kept = x[..., :width], x[..., width:]
    if (variant.pairing or config.rope_pairing) == "neox":
        first, second = turned[..., : width // 2], turned[..., width // 2 :]
        parts = [first * cos - second * sin, first * sin + second * cos]
        turned = xp.concatenate(parts, axis=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = xp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(turned.shape)
    return xp.concatenate([turned, kept], axis=-1).reshape(flat)


def _cache(variant: Variant, here: NodeContext) -> Rounding | None:
    return variant.cache or ("float16" if here.half else None)


def _lagged(x: Any, lag: int, xp: Any) -> Any:
    """Every row that of so many rows before; the first ones their own."""
    if lag == 0:
        return x
    index = np.arange(x.shape[0]) - lag
    return x[np.where((index < 0) | (index >= x.shape[0]), np.arange(x.shape[0]), index)]


def head_index(variant: Variant, config: ModelConfig) -> np.ndarray:
    """The key and value head that each query head reads."""
    heads, kv = config.num_heads, config.num_kv_heads
    index = np.arange(heads)
    return {
        "grouped": index // (heads // kv),
        "interleaved": index % kv,
        "reversed": kv - 1 - index // (heads // kv),
        "first": index * 0,
    }[variant.heads]


def scores(q: Any, k: Any, variant: Variant, here: NodeContext) -> Float[Any, "position head*key"]:
    """Scaled scores of `q[position, width]` and `k[key, width]`, before the mask."""
    xp, config = here.xp, here.config
    kind = _cache(variant, here)
    # ggml rounds queries where it has a float16 cache; a quantized cache meets quantized queries.
    q = rounded(q.reshape(q.shape[0], -1, config.head_dim), None if variant.cache_alone else kind, xp)
    k = rounded(k.reshape(k.shape[0], -1, config.head_dim), kind, xp)
    k = _lagged(k, variant.key_lag, xp)[:, head_index(variant, config)]
    scale = config.head_dim**-0.5 if variant.score_scale is None else variant.score_scale
    values = xp.matmul(xp.transpose(q, (1, 0, 2)), xp.transpose(k, (1, 2, 0))) * scale
    if variant.score_cap is not None:
        values = variant.score_cap * xp.tanh(values / variant.score_cap)
    return xp.transpose(values, (1, 0, 2)).reshape(q.shape[0], -1)


def visible(count: int, variant: Variant) -> np.ndarray:
    """`bool[position, key]`."""
    position, key = np.arange(count)[:, None], np.arange(count)
    seen = {
        "causal": key <= position,
        "none": np.ones((count, count), bool),
        # The first position has nothing else to see.
        "own position hidden": (key < position) | ((position == 0) & (key == 0)),
        "next position visible": key <= position + 1,
    }[variant.mask]
    return seen if variant.window is None else seen & (key > position - variant.window)


def _exponential(x: Any, kind: Exponential, xp: Any) -> Any:
    if kind == "base 2":
        return xp.exp(x / _INVERSE_LN2)
    if kind == "limit":
        return xp.maximum(1 + x / _LIMIT_POWER, 0) ** _LIMIT_POWER
    if kind == "schraudolph":
        shifted = x * _INVERSE_LN2 - _SCHRAUDOLPH_OFFSET
        whole = xp.floor(shifted)
        return xp.exp(whole / _INVERSE_LN2) * (1 + shifted - whole)
    return xp.exp(x)


def softmax(flat: Any, variant: Variant, here: NodeContext) -> Float[Any, "position head*key"]:
    """Masked softmax of scores `[position, head * key]`."""
    xp, count = here.xp, flat.shape[0]
    seen = visible(count, variant)[:, None]
    # Masked scores may be anything, also not finite; they must not meet arithmetic.
    values = xp.where(seen, flat.reshape(count, -1, count), 0.0) / variant.temperature
    largest = xp.max(xp.where(seen, values, -np.inf), axis=-1, keepdims=True)
    if variant.softmax == "no maximum taken off":
        largest = largest * 0
    powers = xp.where(seen, _exponential(xp.where(seen, values - largest, 0.0), variant.exponential, xp), 0.0)
    total = xp.sum(powers, axis=-1, keepdims=True)
    if variant.softmax == "not normalised":
        total = xp.ones_like(total)
    elif variant.softmax == "one more in the sum":
        total = total + xp.exp(-largest)
    return rounded(powers / total, variant.probabilities, xp).reshape(count, -1)


def attend(probabilities: Any, qkv: Any, variant: Variant, here: NodeContext) -> Float[Any, "position width"]:
    """Probabilities times values, heads merged."""
    xp, config, count = here.xp, here.config, probabilities.shape[0]
    kind = _cache(variant, here)
    v = _lagged(rounded(split_qkv(qkv, config)[2], kind, xp), variant.value_lag, xp)
    v = xp.transpose(v[:, head_index(variant, config)], (1, 0, 2))
    p = xp.transpose(probabilities.reshape(count, -1, count), (1, 0, 2))
    p = rounded(p, "float16" if kind == "float16" and not variant.cache_alone else None, xp)
    return xp.transpose(xp.matmul(p, v), (1, 0, 2)).reshape(count, -1)


def activate(x: Any, variant: Variant, xp: Any) -> Any:
    """The activation of the feed-forward's gate."""
    kind = variant.activation
    if kind == "silu":
        return x * _sigmoid(x, xp)
    if kind == "quick-gelu":
        return x * _sigmoid(1.702 * x, xp)
    if kind == "gelu-tanh":
        return 0.5 * x * (1 + xp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))
    if kind == "gelu":
        return 0.5 * x * (1 + _erf(x / np.sqrt(2), xp))
    if kind == "hard-swish":
        return x * xp.clip(x + 3, 0, 6) / 6
    if kind == "sigmoid":
        return _sigmoid(x, xp)
    return xp.maximum(x, 0) if kind == "relu" else x


def _sigmoid(x: Any, xp: Any) -> Any:
    return 0.5 * (1 + xp.tanh(0.5 * x))


def _erf(x: Any, xp: Any) -> Any:
    if xp is not np:
        from jax.scipy.special import erf

        return erf(x)
    from math import erf as scalar

    return np.vectorize(scalar, otypes=[np.float64])(x)


def gated(activated: Any, gate: Any, up: Any, variant: Variant, xp: Any) -> Any:
    """`silu(gate) * up`; with the roles swapped `silu(up) * gate`, whatever was activated."""
    return activate(up, variant, xp) * gate if variant.swapped else activated * up


def joined(previous: Any, normed: Any, branch: Any, factors: tuple[Any, Any], variant: Variant) -> Any:
    """A residual: `skip * previous + branch`, by `factors` of skip and branch."""
    base = normed if variant.skip_from_norm else previous
    return base * factors[0] + branch * factors[1]


# How a node follows from its inputs: (inputs by stage, "previous" the layer's own; variant; context; positions).
NodeFunction = Callable[[dict[str, Any], Variant, NodeContext, Any], Any]


def node_function(stage: Stage) -> NodeFunction:
    """The function of a stage that is no matrix product."""
    return _FUNCTIONS[stage]


_FUNCTIONS: dict[Stage, NodeFunction] = {
    Stage.ATTN_NORM: lambda i, v, c, p: norm(i["previous"], v, c),
    Stage.QKV_BIAS: lambda i, v, c, p: add_bias(i[Stage.QKV_MATMUL], v, c),
    Stage.Q_POST_ROPE: lambda i, v, c, p: rotate(split_qkv(i[Stage.QKV_BIAS], c.config)[0], "q", p, v, c),
    Stage.K_POST_ROPE: lambda i, v, c, p: rotate(split_qkv(i[Stage.QKV_BIAS], c.config)[1], "k", p, v, c),
    Stage.ATTN_SCORES: lambda i, v, c, p: scores(i[Stage.Q_POST_ROPE], i[Stage.K_POST_ROPE], v, c),
    Stage.ATTN_SOFTMAX: lambda i, v, c, p: softmax(i[Stage.ATTN_SCORES], v, c),
    Stage.ATTENTION: lambda i, v, c, p: attend(i[Stage.ATTN_SOFTMAX], i[Stage.QKV_BIAS], v, c),
    Stage.POST_ATTN_RESIDUAL: lambda i, v, c, p: joined(
        i["previous"],
        i.get(Stage.ATTN_NORM),
        i[Stage.ATTN_OUT],
        (v.attention_skip, v.attention_branch),
        v,
    ),
    Stage.FFN_NORM: lambda i, v, c, p: norm(i[Stage.POST_ATTN_RESIDUAL], v, c),
    Stage.FFN_SILU: lambda i, v, c, p: activate(i[Stage.FFN_GATE], v, c.xp),
    Stage.FFN_SWIGL: lambda i, v, c, p: gated(i[Stage.FFN_SILU], i.get(Stage.FFN_GATE), i[Stage.FFN_UP], v, c.xp),
    Stage.POST_FFN_RESIDUAL: lambda i, v, c, p: joined(
        i[Stage.POST_ATTN_RESIDUAL],
        i.get(Stage.FFN_NORM),
        i[Stage.FFN_OUT],
        (v.ffn_skip, v.ffn_branch),
        v,
    ),
    Stage.FINAL_NORM: lambda i, v, c, p: norm(i["previous"], v, c),
}


def needed_inputs(stage: Stage, variant: Variant, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that a node reads: more than usual where the variant reaches past its inputs."""
    if stage is Stage.FFN_SWIGL and variant.swapped:
        return (Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SILU)
    if variant.skip_from_norm and stage is Stage.POST_ATTN_RESIDUAL:
        return (*inputs, Stage.ATTN_NORM)
    if variant.skip_from_norm and stage is Stage.POST_FFN_RESIDUAL:
        return (*inputs, Stage.FFN_NORM)
    return inputs
