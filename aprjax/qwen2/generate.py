"""Token-by-token decoding with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from aprjax.checkpoint.types import Checkpoint, CheckpointError, ModelConfig
from aprjax.qwen2.loading import embed
from aprjax.qwen2.model import Qwen2, bucket, precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context
from aprjax.qwen2.rope import rope_tables
from aprjax.qwen2.sampling import GREEDY, Sampler, Sampling
from aprjax.qwen2.sharding import current_mesh, empty_cache


@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, `[capacity, kv_head, channel]` each, and how many rows are filled."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: int

    @classmethod
    def empty(cls, config: ModelConfig, capacity: int, dtype: str = "float32", mesh: Mesh | None = None) -> Cache:
        """A cache for up to `capacity` positions, split over the model's `mesh`, by default that of `use_mesh`."""
        mesh = mesh or current_mesh()
        shape = (capacity, config.num_kv_heads, config.head_dim)
        blank = tuple(empty_cache(shape, dtype, mesh) for _ in range(config.num_layers))
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
    padded = 1 if count == 1 else bucket(count, model.arithmetic)
    if start + padded > capacity:
        raise ValueError(f"{start} cached and {padded} new positions exceed the cache's capacity of {capacity}")
    with precision_scope(arithmetic):
        hidden = np.zeros((padded, model.config.hidden_size), np.float32)
        hidden[:count] = embed(model.checkpoint, tokens)
        hidden = jnp.asarray(hidden).astype(arithmetic.dtype)
        # On the host: each small operation on the device costs as much as a layer's dispatch.
        visible = np.arange(capacity)[None, :] <= start + np.arange(padded)[:, None]
        cos, sin = rope_tables(
            np.arange(start, start + padded),
            theta=model.config.rope_theta,
            head_dim=model.config.head_dim,
            kind=arithmetic.rope,
            dtype=arithmetic.dtype,
        )
        context = Context(*map(jnp.asarray, (cos, sin, visible)), start=jnp.asarray(np.int32(start)))
        keys, values = [], []
        for index, layer in enumerate(model.layers):
            layer_context = replace(context, keys=cache.keys[index], values=cache.values[index])
            hidden, (k, v), _ = run_layer(layer, hidden, layer_context, {}, {}, arithmetic=arithmetic, capture=False)
            keys.append(k)
            values.append(v)
    return hidden, Cache(tuple(keys), tuple(values), start + count)


class Stop(StrEnum):
    """Why a continuation ended."""

    TOKEN = "stop-token"
    BUDGET = "max-new-tokens"
    CONTEXT = "context-full"


class Generation:
    """A continuation that is made while it is iterated over, token by token.

    The stop token, where one ended it, is its last token.

    Attributes:
        prompt: the tokens before it.
        tokens: the continuation so far.
        stop: why it ended; None before that.
        seed: what tokens were drawn with.
    """

    prompt: tuple[int, ...]
    tokens: list[int]
    stop: Stop | None
    seed: int

    def __init__(
        self,
        model: Qwen2,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
    ) -> None:
        """See `generate`."""
        self._room = room_after(model.checkpoint, len(prompt))
        self._model, self._budget, self._stop_ids = model, max_new_tokens, stop_ids
        self._sampler = Sampler(sampling)
        self.prompt, self.tokens, self.stop, self.seed = tuple(prompt), [], None, self._sampler.seed
        self._steps = self._run()

    def __iter__(self) -> Iterator[int]:
        """The tokens that are still to come: iterating again goes on where it was left."""
        return self._steps

    def _run(self) -> Iterator[int]:
        model, longest = self._model, min(self._budget, self._room)
        needed = max(bucket(len(self.prompt)), len(self.prompt) + longest)
        # A power of two, so that prompts and budgets of similar size share compiled programs.
        with precision_scope(model.arithmetic):
            cache = Cache.empty(model.config, 1 << (needed - 1).bit_length(), model.arithmetic.dtype, model.head.mesh)
        feed = list(self.prompt)
        while len(self.tokens) < longest:
            last, cache = extend(model, feed, cache)
            logits = np.asarray(last)
            if not np.isfinite(logits).all():
                raise not_finite(model.checkpoint, len(self.tokens))
            feed = [self._sampler.choose(logits)]
            self.tokens += feed
            if feed[0] in self._stop_ids:
                self.stop = Stop.TOKEN
            yield feed[0]
            if self.stop is not None:
                return
        self.stop = Stop.BUDGET if longest == self._budget else Stop.CONTEXT


def generate(
    model: Qwen2,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> Generation:
    """The continuation of a prompt, made while it is iterated over.

    Args:
        model: the model.
        prompt: token ids, at least one.
        max_new_tokens: the most tokens that are made.
        stop_ids: the first of these ends it: `Tokenizer.stop_ids` are the checkpoint's own.
        sampling: how each token is chosen; greedy unless told otherwise.

    Raises:
        CheckpointError: the prompt has no tokens, is longer than the context, or holds tokens outside
            the embedding; while iterating, where logits are not finite numbers.
    """
    return Generation(model, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)


def not_finite(checkpoint: Checkpoint, index: int) -> CheckpointError:
    """The error of logits that are NaN or infinite at token `index` of a continuation."""
    return CheckpointError(
        f"the logits of token {index} of the continuation are not finite",
        file=checkpoint.path,
        fix="`python -m aprjax inspect --values` finds weights that no sound model has",
    )


def room_after(checkpoint: Checkpoint, length: int) -> int:
    """How many tokens the context holds after a prompt of `length`: prompt and continuation share it.

    Raises:
        CheckpointError: the prompt is empty, or does not leave room for a single token.
    """
    if length < 1:
        raise CheckpointError("the prompt has no tokens", file=checkpoint.path, fix="give a prompt that is not empty")
    context = checkpoint.config.max_position_embeddings
    if context <= 0:
        # A file that does not say (apr-format.md 2.3): positions are limited by memory alone.
        return 1 << 30
    if length >= context:
        raise CheckpointError(
            f"the prompt has {length} tokens, expected fewer than the context's {context} (max_position_embeddings)",
            file=checkpoint.path,
            fix="shorten the prompt",
        )
    return context - length


def generate_greedy(
    model: Qwen2, tokens: list[int], *, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """The greedy continuation, without the prompt; it ends with the first stop token, which is included.

    Raises:
        CheckpointError: see `generate`.
    """
    return list(generate(model, tokens, max_new_tokens=max_new_tokens, stop_ids=stop_ids))
