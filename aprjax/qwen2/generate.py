"""Token-by-token decoding with a KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.loading import embed
from aprjax.qwen2.model import Qwen2, bucket, causal_context, precision_scope, run_head, run_layer, run_norm


@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, `[capacity, kv_head, channel]` each, and how many rows are filled."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: int

    @classmethod
    def empty(cls, config: ModelConfig, capacity: int, dtype: str = "float32") -> Cache:
        """A cache for up to `capacity` positions."""
        shape = (capacity, config.num_kv_heads, config.head_dim)
        blank = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return cls(blank, blank, 0)


def extend(model: Qwen2, tokens: list[int], cache: Cache) -> tuple[Float[Array, " vocab"], Cache]:
    """Runs `tokens` after those in `cache`: the last position's logits, and the longer cache.

    Raises:
        ValueError: the tokens do not fit into the cache.
    """
    hidden, cache = extend_hidden(model, tokens, cache)
    count = len(tokens)
    with precision_scope(model.arithmetic):
        normed = run_norm(model.norm, hidden[count - 1 : count], arithmetic=model.arithmetic)
        return run_head(model.head, normed, arithmetic=model.arithmetic)[0], cache


def extend_hidden(model: Qwen2, tokens: list[int], cache: Cache) -> tuple[Float[Array, "padded hidden"], Cache]:
    """Runs `tokens` after those in `cache`: the last layer's output, and the longer cache.

    The rows beyond the tokens are padding, up to the length that prompts of about this length share.

    Raises:
        ValueError: the tokens do not fit into the cache.
    """
    arithmetic, count, start = model.arithmetic, len(tokens), cache.length
    capacity = cache.keys[0].shape[0]
    padded = 1 if count == 1 else bucket(count)
    if start + padded > capacity:
        raise ValueError(f"{start} cached and {padded} new positions exceed the cache's capacity of {capacity}")
    with precision_scope(arithmetic):
        hidden = np.zeros((padded, model.config.hidden_size), np.float32)
        hidden[:count] = embed(model.checkpoint, tokens)
        hidden = jnp.asarray(hidden).astype(arithmetic.dtype)
        context = causal_context(model.config, arithmetic, length=padded, start=start)
        visible = jnp.arange(capacity)[None, :] <= start + jnp.arange(padded)[:, None]
        keys, values = [], []
        for index, layer in enumerate(model.layers):
            layer_context = replace(
                context,
                visible=visible,
                keys=cache.keys[index],
                values=cache.values[index],
                start=jnp.asarray(start, jnp.int32),
            )
            hidden, (k, v), _ = run_layer(layer, hidden, layer_context, {}, {}, arithmetic=arithmetic, capture=False)
            keys.append(k)
            values.append(v)
    return hidden, Cache(tuple(keys), tuple(values), start + count)


def generate_greedy(
    model: Qwen2, tokens: list[int], *, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """The greedy continuation, without the prompt; it ends with the first stop token, which is included."""
    capacity = bucket(len(tokens)) + max_new_tokens
    # A power of two, so that prompts and budgets of similar size share compiled programs.
    cache = Cache.empty(model.config, 1 << (capacity - 1).bit_length(), model.arithmetic.dtype)
    continuation: list[int] = []
    feed = list(tokens)
    while len(continuation) < max_new_tokens:
        last, cache = extend(model, feed, cache)
        feed = [int(jnp.argmax(last))]
        continuation += feed
        if feed[0] in stop_ids:
            break
    return continuation
