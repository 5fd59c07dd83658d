"""Sides that generate: a checkpoint that aprjax runs, and llama.cpp live; with what each computation cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.report import SideInfo
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.generate import Cache, extend, extend_hidden, room_after
from aprjax.qwen2.model import Qwen2, bucket, precision_scope, run_head, run_norm
from aprjax.qwen2.streaming import LOGIT_ROWS
from aprjax.text import Tokenizer
from aprjax.trace.engine import check_tokens
from aprjax.trace.generation import Generated, Likeliest, Passes, Scored, Stop, likeliest, rank_of
from aprjax.trace.llama_cpp import ARITHMETIC, LlamaOptions
from aprjax.trace.llama_cpp_generate import generate_llama_cpp, score_llama_cpp

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


class Generator(Protocol):
    """One side of `generate`.

    Attributes:
        checkpoint: the file.
        arithmetic: aprjax's preset that computes it, or comes nearest to the engine that does.
    """

    checkpoint: Checkpoint
    arithmetic: Arithmetic

    @property
    def engine(self) -> dict[str, str]:
        """Version, features and options of an engine, once it has run; nothing for aprjax."""
        ...

    @property
    def batching_rounds(self) -> bool:
        """Whether feeding many tokens at once may round otherwise than one at a time."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end this side's answer."""
        ...

    @property
    def info(self) -> SideInfo:
        """What ran, for the report."""
        ...

    def generate(self, prompt: tuple[int, ...], max_new_tokens: int, *, ignore_stop: bool) -> Generated:
        """The greedy continuation; the longest beginning of the prompt that was just fed is not fed again."""
        ...

    def forget(self) -> None:
        """Lets go of what was fed: the next computation begins from an empty cache."""
        ...

    def score(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> Scored:
        """What this side would have said along a given continuation, from one pass over both."""
        ...


@dataclass
class LocalGenerator:
    """A checkpoint that aprjax runs.

    Attributes:
        checkpoint: the file.
        arithmetic: how it computes.
        progress: told what is being computed.
        twin: a side with the same bytes, whose loaded weights serve this one, too.
    """

    checkpoint: Checkpoint
    arithmetic: Arithmetic
    progress: Progress = _silent
    twin: LocalGenerator | None = None
    _model: Qwen2 | None = None
    _fed: list[int] = field(default_factory=list)
    _cache: Cache | None = None

    @property
    def engine(self) -> dict[str, str]:
        """Nothing: this is aprjax."""
        return {}

    @property
    def batching_rounds(self) -> bool:
        """Exact sums are those of one order, however many tokens are fed; others are as the compiler fuses them."""
        return _batching_rounds(self.arithmetic)

    @property
    def info(self) -> SideInfo:
        """File, digest, format and arithmetic."""
        file = self.checkpoint
        return SideInfo(str(file.path), file.sha256(), file.format, self.arithmetic.name)

    @property
    def model(self) -> Qwen2:
        """The loaded model: loaded when it is first needed."""
        if self._model is None and self.twin is not None:
            self._model = copy.copy(self.twin.model)
            self._model.arithmetic = self.arithmetic
        if self._model is None:
            self.progress("loading", 0, 1)
            self._model = Qwen2(self.checkpoint, self.arithmetic)
        return self._model

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where this file ends an answer."""
        return _stop_ids(self.checkpoint)

    def generate(self, prompt: tuple[int, ...], max_new_tokens: int, *, ignore_stop: bool) -> Generated:
        """See `Generator.generate`.

        Raises:
            CheckpointError: the file lacks what a forward pass needs, or has no such tokens.
        """
        check_tokens(self.checkpoint, list(prompt))
        model = self.model
        feed, cache = self._after(list(prompt), max_new_tokens)
        tokens: list[int] = []
        rows: list[tuple[np.ndarray, np.ndarray, bool]] = []
        passes, stop = Passes(), Stop.BUDGET
        ends = frozenset() if ignore_stop else self.stop_ids
        while len(tokens) < max_new_tokens:
            self.progress("decoding", len(tokens), max_new_tokens)
            start = time.perf_counter()
            last, cache = extend(model, feed, cache)
            rows.append(likeliest(np.asarray(last)))
            single = len(feed) == 1
            passes += Passes(int(not single), int(single), len(feed), time.perf_counter() - start)
            feed = [int(rows[-1][0][0])]
            tokens += feed
            if feed[0] in ends:
                stop = Stop.TOKEN
                break
        self._fed, self._cache = [*prompt, *tokens[:-1]], cache
        return Generated(tuple(tokens), Likeliest.of_rows(rows), stop, passes)

    def forget(self) -> None:
        """Lets go of what was fed: the next computation begins from an empty cache."""
        self._fed, self._cache = [], None

    def score(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> Scored:
        """See `Generator.score`.

        Raises:
            CheckpointError: as `generate`.
        """
        check_tokens(self.checkpoint, [*prompt, *given])
        model, arithmetic = self.model, self.arithmetic
        tokens = [*prompt, *given[:-1]]
        start = time.perf_counter()
        self.progress("verifying in one pass", 0, 1)
        self.forget()
        _, cache = self._after(tokens, 1)
        hidden, cache = extend_hidden(model, tokens, cache)
        self._fed, self._cache = tokens, cache
        rows: list[tuple[np.ndarray, np.ndarray, bool]] = []
        logits, ranks = [], []
        for begin in range(0, len(given), LOGIT_ROWS):
            part = given[begin : begin + LOGIT_ROWS]
            first = len(prompt) - 1 + begin
            # Padded to a bucket, so that continuations of about one length share a compiled program.
            padded = np.zeros((bucket(len(part), arithmetic), hidden.shape[1]), hidden.dtype)
            padded[: len(part)] = np.asarray(hidden[first : first + len(part)])
            with precision_scope(arithmetic):
                normed = run_norm(model.norm, jnp.asarray(padded), arithmetic=arithmetic)
                computed = np.asarray(run_head(model.head, normed, arithmetic=arithmetic))
            for token, row in zip(part, computed[: len(part)], strict=True):
                rows.append(likeliest(row))
                logits.append(row[token])
                ranks.append(rank_of(row, token))
        passes = Passes(1, 0, len(tokens), time.perf_counter() - start)
        return Scored(Likeliest.of_rows(rows), np.array(logits, np.float32), np.array(ranks, np.int32), passes)

    def _after(self, tokens: list[int], room: int) -> tuple[list[int], Cache]:
        """What is still to be fed of `tokens`, and the cache that it comes after, with room for as many more."""
        same = next((i for i, (a, b) in enumerate(zip(self._fed, tokens, strict=False)) if a != b), len(self._fed))
        same = min(same, len(tokens) - 1)
        cache = self._cache
        if cache is not None and same > 0:
            capacity = cache.keys[0].shape[0]
            rest = len(tokens) - same
            padded = 1 if rest == 1 else bucket(rest, self.arithmetic)
            if max(same + padded, len(tokens) + room) <= capacity:
                return tokens[same:], replace(cache, length=same)
        # A power of two, so that prompts and budgets of similar size share compiled programs.
        needed = bucket(len(tokens), self.arithmetic) + room
        capacity = 1 << (needed - 1).bit_length()
        with precision_scope(self.arithmetic):
            return tokens, Cache.empty(self.checkpoint.config, capacity, self.arithmetic.dtype)


@dataclass
class LlamaGenerator:
    """llama.cpp, live.

    Attributes:
        checkpoint: the GGUF file.
        arithmetic: the preset that comes nearest to how it computes.
        options: how it runs.
        progress: told what is being computed.
    """

    checkpoint: Checkpoint
    arithmetic: Arithmetic
    options: LlamaOptions
    progress: Progress = _silent
    _engine: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> dict[str, str]:
        """What ran, once it has."""
        return self._engine

    @property
    def batching_rounds(self) -> bool:
        """The plain build's rows do not depend on how many there are; those of tiles and other kernels do."""
        return self.options.tiled or self.options.repack or self.options.flash_attention

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where llama.cpp ends an answer with this file: `Tokenizer.stop_ids` are `llama_vocab_is_eog`'s."""
        return _stop_ids(self.checkpoint)

    @property
    def info(self) -> SideInfo:
        """File, digest, format, and which llama.cpp."""
        file = self.checkpoint
        return SideInfo(str(file.path), file.sha256(), file.format, ARITHMETIC)

    def generate(self, prompt: tuple[int, ...], max_new_tokens: int, *, ignore_stop: bool) -> Generated:
        """See `Generator.generate`.

        Raises:
            EngineError: llama.cpp cannot be run, or failed.
        """
        self.progress("llama.cpp decodes", 0, 1)
        done = generate_llama_cpp(
            self.checkpoint.path, [prompt], max_new_tokens=max_new_tokens, ignore_stop=ignore_stop, options=self.options
        )
        self._engine = done.engine
        return done.runs[0]

    def forget(self) -> None:
        """Every start of llama.cpp begins from an empty cache."""

    def score(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> Scored:
        """See `Generator.score`.

        Raises:
            EngineError: as `generate`.
        """
        self.progress("llama.cpp verifies in one pass", 0, 1)
        done = score_llama_cpp(self.checkpoint.path, [(prompt, given)], options=self.options)
        self._engine = done.engine
        return done.runs[0]


def _batching_rounds(arithmetic: Arithmetic) -> bool:
    return not arithmetic.exact or arithmetic.depends_on_batch


def _stop_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The file's stop tokens; none without a vocabulary."""
    vocabulary = checkpoint.vocabulary
    if vocabulary is None or not vocabulary.tokens:
        return frozenset()
    return Tokenizer.from_checkpoint(checkpoint).stop_ids


def require_room(checkpoint: Checkpoint, prompt: tuple[int, ...], max_new_tokens: int) -> None:
    """Checks that a prompt and its continuation fit into the model's context.

    Raises:
        CheckpointError: there is no prompt, or they do not fit.
    """
    room = room_after(checkpoint, len(prompt))
    check_tokens(checkpoint, list(prompt))
    if max_new_tokens > room:
        raise CheckpointError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the context's {len(prompt) + room} "
            "(max_position_embeddings)",
            file=checkpoint.path,
            fix=f"ask for --max-new-tokens {room} or fewer",
        )
