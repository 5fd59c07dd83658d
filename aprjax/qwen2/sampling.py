"""Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of llama.cpp's default chain: top-k, top-p, temperature.

    Both cuts look at the model's own distribution. transformers divides by the temperature first, so that its
    top-p keeps more tokens at a temperature above 1 and fewer below; at 1 the two agree.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever the others say.
        top_k: only so many of the likeliest tokens; 0 keeps all.
        top_p: only the fewest of the likeliest tokens whose probabilities, among those that top-k kept, sum to at
            least this (A. Holtzman et al., arXiv:1904.09751); 1 keeps all.
        seed: of the random numbers; None takes one from the operating system, which `Sampler.seed` tells.

    Raises:
        ValueError: a temperature below 0, a negative top-k, a top-p outside (0, 1], a negative seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or a finite number above")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}, expected 0 (all tokens) or a number above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, expected a number above 0 and up to 1 (all tokens)")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"the seed is {self.seed}, expected 0 or a number above")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


GREEDY = Sampling()


def candidates(
    logits: Float[np.ndarray, " vocab"], sampling: Sampling
) -> tuple[Int[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """The tokens that may follow, likeliest first, and their probabilities (float64, sum 1).

    Among equal logits the lower id comes first, so that a cut through them is the same everywhere.
    """
    kept = 1 if sampling.greedy else sampling.top_k
    ids = np.arange(logits.size)
    if 0 < kept < logits.size:
        # Sorting 150,000 logits takes longer than finding the largest few. Equal ones at the cut all stay at first.
        ids = np.flatnonzero(logits >= np.partition(logits, -kept)[-kept])
    ids = ids[np.argsort(-logits[ids], kind="stable")][: kept or None]
    values = logits[ids].astype(np.float64)
    if sampling.greedy:
        return ids, np.ones(1)
    if sampling.top_p < 1:
        cumulative = np.cumsum(_softmax(values))
        count = int(np.searchsorted(cumulative, sampling.top_p)) + 1
        ids, values = ids[:count], values[:count]
    return ids, _softmax(values / sampling.temperature)


def _softmax(values: Float[np.ndarray, " kept"]) -> Float[np.ndarray, " kept"]:
    exponentials = np.exp(values - values[0])
    return exponentials / exponentials.sum()


class Sampler:
    """Draws token after token; the same seed and logits give the same tokens, on every platform.

    Attributes:
        sampling: how.
        seed: what was drawn with: `sampling.seed`, or the one that was taken in its place.
    """

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits: Float[np.ndarray, " vocab"]) -> int:
        """The next token: one random number each, unless greedy."""
        if self.sampling.greedy:
            return int(np.argmax(logits))
        ids, probabilities = candidates(logits, self.sampling)
        # The last sum may round to just below 1.
        place = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
        return int(ids[min(place, len(ids) - 1)])
