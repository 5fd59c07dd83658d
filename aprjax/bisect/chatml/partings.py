"""Where two conditions part: at which token, by how much, and whether noise explains it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from aprjax.bisect.chatml.cells import STOPS, Comparison, Condition, Continuation, Factorial, Stop
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS

# `end`: one side ended and the other went on. `other prompt`: the two were not fed the same ids, so that
# the gap says nothing. `unknown`: nobody measured the noise of these two arithmetics.
Kind = Literal["near-tie", "divergence", "unknown", "end", "other prompt"]


@dataclass(frozen=True)
class Parting:
    """The first token at which two outcomes part.

    Attributes:
        comparison: of what.
        kind: see `Kind`.
        step: the first differing token of the continuation, from 0.
        model_token: the model's token there; None where it had ended.
        ref_token: the reference's.
        gap: how far, in logits, the model's token lies behind on the reference's side; where it is not the
            second best, the margin, which is less.
        sigmas: the gap in standard deviations of a logit's noise; None where that was not measured.
    """

    comparison: Comparison
    kind: Kind
    step: int
    model_token: int | None
    ref_token: int | None
    gap: float | None = None
    sigmas: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


def pairings(
    factorial: Factorial,
    *,
    wraps: tuple[str, str] | None = None,
    arithmetics: tuple[str, str] | None = None,
    stops: tuple[Stop, Stop] | None = None,
) -> tuple[Comparison, ...]:
    """Model against reference, each with everything its own: every prompt in every cell of the factorial.

    Args:
        factorial: what was measured.
        wraps: how often the model's and the reference's prompt is wrapped; by default alike, every way.
        arithmetics: likewise.
        stops: likewise.
    """
    by_wrap = [wraps] if wraps else [(wrap, wrap) for wrap in factorial.wraps]
    by_arithmetic = [arithmetics] if arithmetics else [(name, name) for name in factorial.arithmetics]
    by_stop: list[tuple[Stop, Stop]] = [stops] if stops else [(stop, stop) for stop in STOPS]
    return tuple(
        Comparison(prompt, Condition.as_run("model", w[0], a[0], s[0]), Condition.as_run("ref", w[1], a[1], s[1]))
        for prompt, w, a, s in product(factorial.prompts, by_wrap, by_arithmetic, by_stop)
    )


def alike(factorial: Factorial, comparison: Comparison) -> bool | None:
    """Whether both conditions yield the same tokens and the same end; None where one was not measured."""
    ours = factorial.outcome(comparison.prompt, comparison.model)
    theirs = factorial.outcome(comparison.prompt, comparison.ref)
    return None if ours is None or theirs is None else ours == theirs


def parting(factorial: Factorial, comparison: Comparison) -> Parting | None:
    """Where the two part; None where they do not, or were not measured."""
    ours = factorial.outcome(comparison.prompt, comparison.model)
    theirs = factorial.outcome(comparison.prompt, comparison.ref)
    if ours is None or theirs is None or ours == theirs:
        return None
    step = first_difference(ours.tokens, theirs.tokens)
    model_token = ours.tokens[step] if step < len(ours.tokens) else None
    ref_token = theirs.tokens[step] if step < len(theirs.tokens) else None
    model_run = factorial.run_of(comparison.prompt, comparison.model)
    ref_run = factorial.run_of(comparison.prompt, comparison.ref)
    assert model_run is not None
    assert ref_run is not None
    if model_run.prompt_tokens != ref_run.prompt_tokens:
        return Parting(comparison, "other prompt", step, model_token, ref_token)
    if model_token is None or ref_token is None:
        return Parting(comparison, "end", step, model_token, ref_token)
    sigma = factorial.noise.get((comparison.model.arithmetic, comparison.ref.arithmetic))
    kind, gap, sigmas = judge_flip(ref_run, step, model_token, sigma)
    return Parting(comparison, kind, step, model_token, ref_token, gap, sigmas)


def judge_flip(
    ref: Continuation, step: int, chosen: int, sigma: float | None
) -> tuple[Literal["near-tie", "divergence", "unknown"], float, float | None]:
    """Whether noise explains another choice: the second best, within `NEAR_TIE_SIGMAS`. Kind, gap, gap in sigma."""
    gap = ref.margins[step]
    if ref.runners_up[step] != chosen:
        return "divergence", gap, gap / sigma if sigma else None
    if sigma is None:
        return "unknown", gap, None
    near = gap <= NEAR_TIE_SIGMAS * sigma
    return "near-tie" if near else "divergence", gap, gap / sigma if sigma else None


def first_difference(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """The first index at which two token sequences differ; their common length if neither does before."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
