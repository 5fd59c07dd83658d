"""Greedy decoding of many prompts at once: one step feeds one token of every sequence.

Matrix products see the tokens of all sequences together, so a step reads the weights once; only the
attention, over a cache of each sequence's own, tells sequences apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.generate import generate, not_finite, room_after
from aprjax.qwen2.loading import embed
from aprjax.qwen2.model import Qwen2, bucket, precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context, DecoderLayer
from aprjax.qwen2.rope import rope_tables
from aprjax.qwen2.sharding import empty_cache
from aprjax.qwen2.stages import Tap

# Keys and values of all sequences that decode together: a quarter of the memory that a small machine can spare.
MOST_CACHE_BYTES = 1 << 30
# Logits of 64 sequences take 39 MB with Qwen2's vocabulary, and a step is as wide as a prefill of 64 tokens.
MOST_SEQUENCES = 64
# Positions of one prefill: as many as the long probe's, whose activations are known to fit.
MOST_PREFILL_POSITIONS = 512

# Rows are given up when at most every fourth is needed: each narrower program saves less than it costs to compile.
SHRINK = 4

OnStep = Callable[[int, int], None]


def generate_batch(
    model: Qwen2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, as `generate_greedy` gives it for one.

    Which sequences run together changes no bit with an `exact` arithmetic of the plain build: its sums are in the
    engine's order, whatever stands beside them. An engine whose kernels depend on the batch
    (`Arithmetic.depends_on_batch`) is asked for one sequence after the other, which costs as much as that. With the
    other arithmetics the batch changes the rounding of float32 sums, so that the choice between two near-equal
    logits may fall otherwise than alone.

    Args:
        model: the model.
        prompts: token ids, at least one each; lengths may differ.
        max_new_tokens: the most tokens that each is continued by; fewer where the context is full before.
        stop_ids: a sequence ends with the first of these, which is included.
        on_step: called after every step with the tokens that are done and the most there can be; a
            sequence that has ended counts as done to its budget.

    Returns:
        The continuations without the prompts, in the order of the prompts.

    Raises:
        CheckpointError: a prompt is empty or fills the context, a token lies outside the embedding, or
            logits are not finite numbers.
    """
    room = [room_after(model.checkpoint, len(prompt)) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return found
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step(done, len(prompts) * max_new_tokens)

    if model.arithmetic.depends_on_batch:
        for index, prompt in enumerate(prompts):
            for token in generate(model, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids):
                found[index].append(token)
                advance(1)
            advance(max_new_tokens - len(found[index]))
        return found
    for together in _waves(model, prompts, max_new_tokens):
        wave = [
            _Sequence(list(prompts[index]), min(max_new_tokens, room[index]), max_new_tokens, stop_ids)
            for index in together
        ]
        _decode(model, wave, advance)
        for index, sequence in zip(together, wave, strict=True):
            found[index] = sequence.tokens
    return found


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _capacity(length: int, max_new_tokens: int) -> int:
    # The last token is chosen and never fed. A power of two: near lengths share compiled programs.
    return _power_of_two(max(bucket(length), length + max_new_tokens - 1))


def _waves(model: Qwen2, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Prompts of similar length, as many as the cache's memory allows, by their index."""
    config = model.config
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    per_position = numbers * np.dtype(model.arithmetic.dtype).itemsize
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    while order:
        for size in range(min(len(order), MOST_SEQUENCES), 0, -1):
            longest = _capacity(len(prompts[order[size - 1]]), max_new_tokens)
            if size == 1 or _power_of_two(size) * longest * per_position <= MOST_CACHE_BYTES:
                yield order[:size]
                order = order[size:]
                break


@dataclass
class _Sequence:
    """One prompt and its continuation so far.

    Attributes:
        prompt: token ids.
        budget: the most tokens that it is continued by.
        asked: the same before the context was looked at.
        stop_ids: tokens that end it.
        tokens: the continuation.
    """

    prompt: list[int]
    budget: int
    asked: int
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.tokens) == self.budget or (bool(self.tokens) and self.tokens[-1] in self.stop_ids)

    def take(self, token: int) -> int:
        """Goes on by a token; how many of those that were asked for are done with it."""
        self.tokens.append(token)
        return 1 + (self.asked - len(self.tokens) if self.ended else 0)


@dataclass
class _Batch:
    """Sequences that decode together: row `r` of every array belongs to one of them, or to none (padding).

    Attributes:
        keys: each layer's, `[row, capacity, kv_head, channel]`.
        values: likewise.
        cos: of every position of the cache, `[capacity, half]`.
        sin: likewise.
    """

    model: Qwen2
    keys: list[Array]
    values: list[Array]
    cos: Array
    sin: Array

    @classmethod
    def empty(cls, model: Qwen2, rows: int, capacity: int) -> _Batch:
        config, arithmetic = model.config, model.arithmetic
        shape = (rows, capacity, config.num_kv_heads, config.head_dim)
        keys, values = ([empty_cache(shape, arithmetic.dtype, model.head.mesh) for _ in model.layers] for _ in range(2))
        cos, sin = rope_tables(
            np.arange(capacity),
            theta=config.rope_theta,
            head_dim=config.head_dim,
            kind=arithmetic.rope,
            dtype=arithmetic.dtype,
        )
        return cls(model, keys, values, jnp.asarray(cos), jnp.asarray(sin))

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    def prefill(self, prompts: list[list[int]]) -> Float[Array, "row hidden"]:
        """Runs prompt `r` into row `r`; the last layer's output at each prompt's last token."""
        model, last = self.model, np.zeros((self.rows, self.model.config.hidden_size), self.model.arithmetic.dtype)
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(bucket(len(prompt)), []).append(row)
        for length, rows in by_length.items():
            most = max(1, MOST_PREFILL_POSITIONS // length)
            for first in range(0, len(rows), most):
                part = rows[first : first + most]
                count = _power_of_two(len(part))
                fed = np.zeros((count, length, model.config.hidden_size), np.float32)
                for index, row in enumerate(part):
                    fed[index, : len(prompts[row])] = embed(model.checkpoint, prompts[row])
                # Rows beyond the batch are dropped when they are written.
                target = jnp.asarray(part + [self.rows] * (count - len(part)), jnp.int32)
                hidden = jnp.asarray(fed.reshape(count * length, -1)).astype(model.arithmetic.dtype)
                context = Context(
                    jnp.tile(self.cos[:length], (count, 1)),
                    jnp.tile(self.sin[:length], (count, 1)),
                    jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (count, length, length)),
                    start=jnp.zeros(count, jnp.int32),
                    sequences=count,
                )
                for index, layer in enumerate(model.layers):
                    hidden, (k, v), _ = run_layer(
                        layer, hidden, context, {}, {}, arithmetic=model.arithmetic, capture=False
                    )
                    self.keys[index] = _written(self.keys[index], k, target)
                    self.values[index] = _written(self.values[index], v, target)
                outputs = np.asarray(hidden).reshape(count, length, -1)
                for index, row in enumerate(part):
                    last[row] = outputs[index, len(prompts[row]) - 1]
        return jnp.asarray(last)

    def step(self, tokens: list[int], starts: list[int]) -> Float[Array, "row hidden"]:
        """Feeds one token to every row at its own position; the last layer's output."""
        model = self.model
        hidden = jnp.asarray(embed(model.checkpoint, tokens)).astype(model.arithmetic.dtype)
        start = jnp.asarray(np.asarray(starts, np.int32))
        for index, layer in enumerate(model.layers):
            hidden, self.keys[index], self.values[index] = _decode_layer(
                layer,
                hidden,
                self.keys[index],
                self.values[index],
                (self.cos, self.sin, start),
                arithmetic=model.arithmetic,
            )
        return hidden

    def keep(self, rows: list[int], count: int) -> None:
        """Keeps these rows, in this order, and room for `count`."""
        chosen = jnp.asarray(rows + [rows[0]] * (count - len(rows)), jnp.int32)
        for index in range(len(self.keys)):
            self.keys[index] = _chosen(self.keys[index], chosen)
            self.values[index] = _chosen(self.values[index], chosen)

    def choose(self, hidden: Float[Array, "row hidden"]) -> tuple[Int[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """The likeliest next token of every row, and whether all its logits are finite."""
        arithmetic = self.model.arithmetic
        normed = run_norm(self.model.norm, hidden, arithmetic=arithmetic)
        chosen, finite = _likeliest(run_head(self.model.head, normed, arithmetic=arithmetic))
        return np.asarray(chosen), np.asarray(finite)


def _decode(model: Qwen2, sequences: list[_Sequence], advance: Callable[[int], None]) -> None:
    """Continues every sequence to its end; `advance` is told of the tokens that are done."""
    with precision_scope(model.arithmetic):
        capacity = max(_capacity(len(sequence.prompt), sequence.budget) for sequence in sequences)
        batch = _Batch.empty(model, _power_of_two(len(sequences)), capacity)
        hidden = batch.prefill([sequence.prompt for sequence in sequences])
        rows = list(sequences)
        while True:
            chosen, finite = batch.choose(hidden)
            for row, sequence in enumerate(rows):
                if sequence.ended:
                    continue
                if not finite[row]:
                    raise not_finite(model.checkpoint, len(sequence.tokens))
                advance(sequence.take(int(chosen[row])))
            going = [row for row, sequence in enumerate(rows) if not sequence.ended]
            if not going:
                return
            if _power_of_two(len(going)) <= batch.rows // SHRINK:
                batch.keep(going, _power_of_two(len(going)))
                rows = [rows[row] for row in going]
            # Rows that have ended go on with their last token, and padding with the first row's: nobody looks.
            fed = rows + [rows[0]] * (batch.rows - len(rows))
            hidden = batch.step([s.tokens[-1] for s in fed], [len(s.prompt) + len(s.tokens) - 1 for s in fed])


@partial(jax.jit, donate_argnames=("keys", "values"), static_argnames=("arithmetic",))
def _decode_layer(
    layer: DecoderLayer,
    hidden: Float[Array, "row hidden"],
    keys: Float[Array, "row capacity kv_head channel"],
    values: Float[Array, "row capacity kv_head channel"],
    where: tuple[Array, Array, Array],
    *,
    arithmetic: Arithmetic,
) -> tuple[Array, Array, Array]:
    """One layer for one token of every row, at its own position; the caches are changed in place.

    `where` are cosines and sines `[capacity, half]` and each row's position.
    """
    cos, sin, start = where
    visible = jnp.arange(keys.shape[1])[None, None, :] <= start[:, None, None]
    context = Context(cos[start], sin[start], visible, keys, values, start, sequences=keys.shape[0])
    hidden, (keys, values) = layer(hidden.astype(arithmetic.dtype), context, arithmetic, Tap())
    return hidden, keys, values


@partial(jax.jit, donate_argnames=("cache",))
def _written(cache: Array, new: Array, rows: Int[Array, " sequence"]) -> Array:
    """`new` at the first positions of `rows`."""
    return cache.at[rows, : new.shape[1]].set(new, mode="drop")


@jax.jit
def _chosen(cache: Array, rows: Int[Array, " row"]) -> Array:
    return cache[rows]


@jax.jit
def _likeliest(logits: Float[Array, "row vocab"]) -> tuple[Int[Array, " row"], Bool[Array, " row"]]:
    return jnp.argmax(logits, axis=-1), jnp.isfinite(logits).all(axis=-1)
