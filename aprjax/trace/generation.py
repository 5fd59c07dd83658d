"""What a side that generates yields, whatever computes it: the likeliest tokens of every step, and when it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Int

# Kept of every step. Two decide a near-tie; the others say what else was close.
KEPT = 10


class Stop(StrEnum):
    """Why a continuation ended."""

    TOKEN = "stop-token"
    BUDGET = "max-new-tokens"


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of every step, best first; among equals the lower id is first.

    Attributes:
        ids: token ids.
        logits: theirs.
        finite: whether every logit of the step is a finite number.
    """

    ids: Int[np.ndarray, "step kept"]
    logits: Float[np.ndarray, "step kept"]
    finite: Bool[np.ndarray, " step"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def best(self) -> list[int]:
        """The likeliest token of every step."""
        return [int(token) for token in self.ids[:, 0]]

    def first(self, count: int) -> Likeliest:
        """The first steps alone."""
        return Likeliest(self.ids[:count], self.logits[:count], self.finite[:count])

    @classmethod
    def of_rows(cls, rows: list[tuple[np.ndarray, np.ndarray, bool]]) -> Likeliest:
        """From what `likeliest` gives for each step; there may be none."""
        ids = np.array([ids for ids, _, _ in rows], np.int32).reshape(len(rows), -1)
        logits = np.array([logits for _, logits, _ in rows], np.float32).reshape(len(rows), -1)
        return cls(ids, logits, np.array([finite for _, _, finite in rows], bool))


def likeliest(logits: Float[np.ndarray, " vocab"]) -> tuple[np.ndarray, np.ndarray, bool]:
    """The `KEPT` likeliest tokens of one step, their logits, and whether all logits are finite.

    NaN counts as less than every number, as in the comparisons of llama.cpp's greedy sampler
    (`llama_sampler_greedy_apply`).
    """
    finite = bool(np.isfinite(logits).all())
    row = logits if finite else np.where(np.isnan(logits), -np.inf, logits)
    kept = min(KEPT, row.size)
    # The smallest kept value may be shared by tokens of lower ids: all of them are candidates.
    candidates = np.flatnonzero(row >= np.partition(row, row.size - kept)[row.size - kept])
    order = np.lexsort((candidates, -row[candidates]))[:kept]
    chosen = candidates[order]
    return chosen.astype(np.int32), row[chosen].astype(np.float32), finite


@dataclass(frozen=True)
class Passes:
    """What a side computed.

    Attributes:
        batched: forward passes over many tokens at once: a prompt, or a prompt with its continuation.
        steps: forward passes over one token.
        tokens: tokens fed, in all passes.
        seconds: what they took, without loading the model; programs that were compiled for them count.
    """

    batched: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.batched + other.batched,
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Generated:
    """A greedy continuation.

    Attributes:
        tokens: the continuation, its stop token included.
        likeliest: of every step; the first of each is the token.
        stop: why it ended.
        passes: what it cost.
    """

    tokens: tuple[int, ...]
    likeliest: Likeliest
    stop: Stop
    passes: Passes


@dataclass(frozen=True)
class Scored:
    """What a side would have said at each step of a continuation that it is given.

    Attributes:
        likeliest: of every step.
        logits: of the given token at each step.
        ranks: of the given token at each step: 1 is the likeliest.
        passes: what it cost.
    """

    likeliest: Likeliest
    logits: Float[np.ndarray, " step"]
    ranks: Int[np.ndarray, " step"]
    passes: Passes

    def first_difference(self, tokens: tuple[int, ...]) -> int | None:
        """The first step whose likeliest token is another than the given one."""
        different = np.flatnonzero(self.likeliest.ids[:, 0] != np.asarray(tokens))
        return int(different[0]) if different.size else None


def rank_of(logits: Float[np.ndarray, " vocab"], token: int) -> int:
    """How many tokens greedy decoding prefers to this one, and one: among equals the lower id is preferred."""
    own = logits[token]
    if np.isnan(own):
        return int(logits.size)
    return 1 + int(np.count_nonzero(logits > own)) + int(np.count_nonzero(logits[:token] == own))
