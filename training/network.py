"""The network while it is trained: a Qwen2 in plain float32 arrays, many sequences at once.

It is written apart from `aprjax.qwen2`, whose layers are made for encoded weights and one sequence; a test holds the
two to the same logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aprjax.checkpoint.types import ModelConfig, canonical_tensor_shapes

Weights = dict[str, Any]

# About 5 million parameters. Q4_K has blocks of 256 along a row, so every row is a multiple of 256 long.
CONFIG = ModelConfig(
    architecture="qwen2",
    hidden_size=256,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=768,
    vocab_size=4096,
    max_position_embeddings=1024,
    rope_theta=1e6,
    rope_pairing="neox",
    rms_norm_eps=1e-6,
)


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Random weights by canonical name; the head is the embedding's, as in the small Qwen2s."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in canonical_tensor_shapes(config).items():
        if name == "lm_head.weight":
            continue
        if name.endswith("norm.weight"):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        elif name == "model.embed_tokens.weight":
            value = random.normal(0, 0.02, shape)  # GPT-2's and Qwen2's initializer_range
        else:
            # Half of 1 / sqrt(width); what is added to the residual is smaller the more layers add to it (GPT-2).
            scale = 0.5 * shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= (2 * config.num_layers) ** 0.5
            value = random.normal(0, scale, shape)
        weights[name] = jnp.asarray(value, jnp.float32)
    return weights


def logits(
    weights: Weights, tokens: Int[Array, "sequence position"], config: ModelConfig
) -> Float[Array, "sequence position vocab"]:
    """Of every position, with a causal mask."""
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[tokens]
    cos, sin = _rotation(tokens.shape[1], config)
    for layer in range(config.num_layers):
        part = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        hidden = hidden + _attention(part, _norm(hidden, part["input_layernorm.weight"], config), cos, sin, config)
        fed = _norm(hidden, part["post_attention_layernorm.weight"], config)
        gate, up = fed @ part["mlp.gate_proj.weight"].T, fed @ part["mlp.up_proj.weight"].T
        hidden = hidden + (jax.nn.silu(gate) * up) @ part["mlp.down_proj.weight"].T
    return _norm(hidden, weights["model.norm.weight"], config) @ embedding.T


def _norm(x: Array, weight: Array, config: ModelConfig) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def _rotation(count: int, config: ModelConfig) -> tuple[Array, Array]:
    half = config.head_dim // 2
    angles = np.arange(count)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    return jnp.asarray(np.cos(angles), jnp.float32)[:, None], jnp.asarray(np.sin(angles), jnp.float32)[:, None]


def _attention(part: Weights, x: Array, cos: Array, sin: Array, config: ModelConfig) -> Array:
    def project(name: str, heads: int) -> Array:
        y = x @ part[f"self_attn.{name}_proj.weight"].T + part[f"self_attn.{name}_proj.bias"]
        return y.reshape(*x.shape[:2], heads, config.head_dim)

    def rotate(y: Array) -> Array:
        first, second = jnp.split(y, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k = rotate(project("q", config.num_heads)), rotate(project("k", config.num_kv_heads))
    v = project("v", config.num_kv_heads)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return attended.reshape(*x.shape[:2], -1) @ part["self_attn.o_proj.weight"].T
