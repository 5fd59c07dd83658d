"""`Qwen2`: embedding, layers, final norm and head, run layer by layer.

One layer is the unit of compilation: `run_layer` is jitted with the weights as arguments, so that all
layers of one block-type mix share one program. `Qwen2.__call__` composes the same functions into an
ordinary pure function of (parameters, tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.checkpoint.types import Checkpoint, ModelConfig
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.loading import embed, head_tensor, load_layer, load_norm, pack, require_runnable
from aprjax.qwen2.modules import Context, DecoderLayer, PackedWeight, RMSNorm, multiply
from aprjax.qwen2.rope import rope_tables
from aprjax.qwen2.stages import Stage, Tap


@contextmanager
def precision_scope(arithmetic: Arithmetic) -> Iterator[None]:
    """Allows float64 inside the block where the arithmetic needs it; there is no global switch."""
    if arithmetic.dtype == "float64":
        with jax.enable_x64(True):
            yield
    else:
        yield


@partial(jax.jit, static_argnames=("arithmetic", "capture"))
def run_layer(
    layer: DecoderLayer,
    hidden: Float[Array, "position hidden"],
    context: Context,
    replacements: dict[Stage, Array],
    perturbations: dict[Stage, Array],
    *,
    arithmetic: Arithmetic,
    capture: bool,
) -> tuple[Float[Array, "position hidden"], tuple[Array, Array], dict[Stage, Array]]:
    """One layer: its output, its keys and values, and (if `capture`) every stage as computed."""
    tap = Tap(capture=capture, replace=replacements, perturb=perturbations)
    output, cache = layer(hidden.astype(arithmetic.dtype), context, arithmetic, tap)
    return output, cache, tap.captured


@partial(jax.jit, static_argnames=("arithmetic",))
def run_norm(norm: RMSNorm, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    """The final norm."""
    with jax.named_scope(Stage.FINAL_NORM):
        return norm(hidden.astype(arithmetic.dtype))


@partial(jax.jit, static_argnames=("arithmetic",))
def run_head(head: PackedWeight, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    """Logits `[position, vocab]`."""
    with jax.named_scope(Stage.LM_HEAD):
        return multiply(head, hidden.astype(arithmetic.dtype), arithmetic)


def bucket(length: int) -> int:
    """The padded length that prompts of `length` tokens share, so that near lengths don't recompile.

    Powers of two up to 64, then multiples of 64: never more than a third is padding beyond 128 tokens.
    """
    if length <= 64:
        return max(8, 1 << (length - 1).bit_length())
    return -(-length // 64) * 64


def causal_context(config: ModelConfig, arithmetic: Arithmetic, *, length: int, start: int = 0) -> Context:
    """Positions `start … start + length - 1`, each seeing itself and those before it."""
    with precision_scope(arithmetic):
        cos, sin = rope_tables(
            np.arange(start, start + length),
            theta=config.rope_theta,
            head_dim=config.head_dim,
            kind=arithmetic.rope,
            dtype=arithmetic.dtype,
        )
        return Context(jnp.asarray(cos), jnp.asarray(sin), jnp.tril(jnp.ones((length, length), bool)))


def embed_padded(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    """The embedding rows, with rows of zeros after them up to the bucket's length.

    Causality keeps the padding out of every real position. Zeros are safe: RMSNorm of zeros is zero.
    """
    rows = embed(checkpoint, tokens)
    padded = np.zeros((bucket(len(tokens)), rows.shape[1]), np.float32)
    padded[: len(tokens)] = rows
    return padded


@dataclass
class Qwen2:
    """A loaded model: every weight encoded, on the default device.

    Attributes:
        checkpoint: where the weights come from.
        arithmetic: how it computes.
    """

    checkpoint: Checkpoint
    arithmetic: Arithmetic = PRESETS["float32"]
    layers: list[DecoderLayer] = field(init=False, repr=False)
    norm: RMSNorm = field(init=False, repr=False)
    head: PackedWeight = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_runnable(self.checkpoint)
        self.layers = [load_layer(self.checkpoint, index) for index in range(self.config.num_layers)]
        self.norm = load_norm(self.checkpoint, "model.norm.weight")
        self.head = pack(head_tensor(self.checkpoint))

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's dimensions and constants."""
        return self.checkpoint.config

    def __call__(self, tokens: list[int] | np.ndarray) -> Float[Array, "position vocab"]:
        """Logits of every position."""
        logits, _ = self.forward(list(tokens), capture=False)
        return logits

    def run_with_cache(self, tokens: list[int]) -> tuple[Array, dict[tuple[int, Stage], Array]]:
        """Logits, and every stage's value by (layer, stage); layer -1 holds the stages outside the layers."""
        return self.forward(tokens, capture=True)

    def forward(self, tokens: list[int], *, capture: bool) -> tuple[Array, dict[tuple[int, Stage], Array]]:
        """Runs layer by layer; see `run_with_cache`."""
        arithmetic, count = self.arithmetic, len(tokens)
        trace: dict[tuple[int, Stage], Array] = {}
        with precision_scope(arithmetic):
            hidden = jnp.asarray(embed_padded(self.checkpoint, tokens)).astype(arithmetic.dtype)
            trace[-1, Stage.EMBEDDING] = hidden[:count]
            context = causal_context(self.config, arithmetic, length=hidden.shape[0])
            for index, layer in enumerate(self.layers):
                hidden, _, captured = run_layer(layer, hidden, context, {}, {}, arithmetic=arithmetic, capture=capture)
                trace.update({(index, stage): trim(stage, value, count) for stage, value in captured.items()})
            normed = run_norm(self.norm, hidden[:count], arithmetic=arithmetic)
            logits = run_head(self.head, normed, arithmetic=arithmetic)
            trace[-1, Stage.FINAL_NORM], trace[-1, Stage.LM_HEAD] = normed, logits
        return logits, trace if capture else {}


def trim(stage: Stage, value: Any, count: int) -> Any:
    """A stage's rows of the real tokens; of scores and probabilities also the real keys."""
    if stage not in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):
        return value[:count]
    padded = value.shape[0]
    return value[:count].reshape(count, -1, padded)[:, :, :count].reshape(count, -1)


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
        normed = run_norm(model.norm, hidden[count - 1 : count], arithmetic=arithmetic)
        logits = run_head(model.head, normed, arithmetic=arithmetic)[0]
    return logits, Cache(tuple(keys), tuple(values), start + count)


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
        logits, cache = extend(model, feed, cache)
        feed = [int(jnp.argmax(logits))]
        continuation += feed
        if feed[0] in stop_ids:
            break
    return continuation
