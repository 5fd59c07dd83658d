"""Top-1/top-2 margins of two sides at the same positions, and what a flip had to overcome."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from aprjax.bisect.report import MarginReport, SideMargin

# A flip is put down to noise when the gap it had to overcome is at most this many standard deviations
# of a logit's noise. A gap is a difference of two logits, whose noise has sqrt(2) times the standard
# deviation of one; three of those hold 99.7 % of a normal distribution: 3 * sqrt(2) = 4.2.
NEAR_TIE_SIGMAS = 3 * 2**0.5


def margins(
    model: Float[np.ndarray, "position vocab"], ref: Float[np.ndarray, "position vocab"], positions: list[int]
) -> list[MarginReport]:
    """One report per row; row i holds the logits at `positions[i]`."""
    return [_margin(position, a, b) for position, a, b in zip(positions, model, ref, strict=True)]


def _margin(position: int, model: np.ndarray, ref: np.ndarray) -> MarginReport:
    ours, theirs = _best_two(model), _best_two(ref)
    delta = model.astype(np.float64) - ref.astype(np.float64)
    log_p, log_q = log_softmax(ref), log_softmax(model)
    return MarginReport(
        position=position,
        model=ours,
        ref=theirs,
        flip=ours.top1 != theirs.top1,
        gap=float(ref[theirs.top1]) - float(ref[ours.top1]),
        # Rounding can leave a divergence of equal distributions a hair below zero.
        kl=max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q)))),
        rms_delta=float(np.sqrt(np.mean(delta**2))),
        max_delta=float(np.max(np.abs(delta))),
    )


def _best_two(logits: np.ndarray) -> SideMargin:
    """The two largest logits; among equals the lower id wins, as in greedy decoding."""
    first = int(np.argmax(logits))
    rest = logits.copy()
    rest[first] = -np.inf
    second = int(np.argmax(rest))
    return SideMargin(first, second, float(logits[first]) - float(logits[second]))


def log_softmax(logits: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """The natural logarithms of the probabilities, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
