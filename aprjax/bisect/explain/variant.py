"""A `Variant`: the computation of a Qwen2 with some of its choices made otherwise. The defaults are the right ones.

Every choice can be changed alone or together with others (`dataclasses.replace`), so that two faults of one node
compose without a word about each other. Numbers may be traced by jax: they are what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from aprjax.checkpoint.types import EncodedTensor, RopePairing
from aprjax.qwen2.stages import Stage

NormKind = Literal["rms", "mean-subtracting", "none"]
NormWeight = Literal["own", "plus one", "none", "other norm's"]
HeadMap = Literal["grouped", "interleaved", "reversed", "first"]
Mask = Literal["causal", "none", "own position hidden", "next position visible"]
Rounding = Literal["float16", "bfloat16", "q8_0"]
Activations = Literal["as they are", "engine", "per 256", "per 32", "realizar", "float16", "bfloat16"]
Softmax = Literal["plain", "not normalised", "one more in the sum", "no maximum taken off"]
Exponential = Literal["exact", "schraudolph", "limit", "base 2"]
Activation = Literal["silu", "gelu", "gelu-tanh", "relu", "quick-gelu", "hard-swish", "identity", "sigmoid"]


@dataclass(frozen=True)
class Variant:
    """How the nodes of a forward pass are computed; None stands for what the config says.

    Attributes:
        theta: rotary base.
        pairing: of a head's channels.
        offset: added to every position before the rotation.
        stretch: factor on every position before the rotation (linear scaling).
        rotated: which of q and k are rotated.
        backwards: the rotation's angle with the other sign.
        rope_width: channels of each head that are rotated, from the first; None: all.
        eps: of every norm.
        eps_outside: added to the root rather than under it.
        norm: what is normalised by.
        norm_weight: what the normalised values are multiplied by.
        norms: how often the norm is applied.
        bias: factors on the biases of q, k and v.
        score_scale: what products of queries and keys are multiplied by.
        score_cap: `cap * tanh(scores / cap)`; None: no cap.
        heads: which key and value head a query head reads.
        mask: which keys a query sees.
        window: how many keys a query sees, itself included; None: all before it.
        key_lag: every key is that of so many positions before.
        value_lag: the same of the values.
        cache: what keys and values are rounded to; None: the arithmetic's.
        cache_alone: queries and probabilities are not rounded with them, as ggml does.
        probabilities: what the softmax's result is rounded to; None: nothing.
        softmax: how the exponentials are made probabilities.
        exponential: the exponential of the softmax.
        temperature: scores are divided by it inside the softmax.
        activation: of the feed-forward's gate.
        swapped: the activation is applied to `up` rather than to `gate`.
        attention_skip: factor on the residual stream where attention joins it.
        attention_branch: factor on the attention's output there.
        ffn_skip: the same for the feed-forward.
        ffn_branch: the same.
        skip_from_norm: the residual is the normalised input rather than the input.
        activations: what a product's activations are quantized or rounded to, as in `Arithmetic.activations`; None: as
            in the rest of the trace.
        head: which tensor the logits are products with.
        factors: by stage, what its value is multiplied by at the end.
        weights: by canonical tensor name, what takes its place: encoded, or decoded `float[out, in]` (`float[n]`).
    """

    theta: Any = None
    pairing: RopePairing | None = None
    offset: int = 0
    stretch: Any = 1.0
    rotated: Literal["qk", "q", "k", ""] = "qk"
    backwards: bool = False
    rope_width: int | None = None
    eps: Any = None
    eps_outside: bool = False
    norm: NormKind = "rms"
    norm_weight: NormWeight = "own"
    norms: int = 1
    bias: tuple[Any, Any, Any] = (1.0, 1.0, 1.0)
    score_scale: Any = None
    score_cap: Any = None
    heads: HeadMap = "grouped"
    mask: Mask = "causal"
    window: int | None = None
    key_lag: int = 0
    value_lag: int = 0
    cache: Rounding | None = None
    cache_alone: bool = False
    probabilities: Rounding | None = None
    softmax: Softmax = "plain"
    exponential: Exponential = "exact"
    temperature: Any = 1.0
    activation: Activation = "silu"
    swapped: bool = False
    attention_skip: Any = 1.0
    attention_branch: Any = 1.0
    ffn_skip: Any = 1.0
    ffn_branch: Any = 1.0
    skip_from_norm: bool = False
    activations: Activations | None = None
    head: Literal["own", "embedding"] = "own"
    factors: Mapping[Stage, Any] = field(default_factory=dict)
    weights: Mapping[str, EncodedTensor | np.ndarray] = field(default_factory=dict)


SOUND = Variant()
