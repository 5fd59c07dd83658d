"""What `margins` reports: a row per position, their summary, and how far the flips were foreseen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from aprjax.bisect.noise.logits import LogitNoise
from aprjax.bisect.report import SidedFinding, SideInfo, SideMargin, Verdict

SCHEMA = "aprjax.margins/1"


@dataclass(frozen=True)
class TokenMargin:
    """Both sides' next-token logits at one position of the tokens that both were fed.

    Attributes:
        chunk: which piece of the text; 0 where there is but one.
        position: within the piece.
        token: the token fed there.
        text: that token, readable.
        part: what the position's logits speak of: "prompt" or "continuation" by where the next token is, "text".
        target: the token that comes next; None at the end.
        model: the model's two best tokens; None where a side's logits are not all finite.
        ref: the reference's.
        model_text: the model's best token, readable.
        ref_text: the reference's.
        flip: whether the two best tokens differ.
        rank: of the model's choice among the reference's logits, from 1.
        gap: the reference's logit of its own choice less that of the model's choice.
        model_rank: of the reference's choice among the model's logits.
        model_gap: the model's logit of its own choice less that of the reference's choice.
        kl: KL(ref || model) in nats.
        cosine: of the two rows of logits.
        rms_delta: root mean square of the logits' difference.
        max_delta: the largest.
        drift: standard deviation (ddof 1) of the difference at the reference's likeliest tokens: what moves gaps.
        model_probability: the model's of the target.
        ref_probability: the reference's.
        model_loss: -ln of the model's probability of the target.
        ref_loss: the reference's.
        gap_sigmas: the larger of the two gaps, in units of the measured noise.
        margin_sigmas: the reference's margin, likewise.
        at_risk: whether the position was listed as one that may flip, before its flip was looked at.
        verdict: agree, near-tie, divergence or unmeasured.
    """

    chunk: int
    position: int
    token: int
    text: str
    part: str
    target: int | None
    model: SideMargin | None = None
    ref: SideMargin | None = None
    model_text: str = ""
    ref_text: str = ""
    flip: bool = False
    rank: int | None = None
    gap: float | None = None
    model_rank: int | None = None
    model_gap: float | None = None
    kl: float | None = None
    cosine: float | None = None
    rms_delta: float | None = None
    max_delta: float | None = None
    drift: float | None = None
    model_probability: float | None = None
    ref_probability: float | None = None
    model_loss: float | None = None
    ref_loss: float | None = None
    gap_sigmas: float | None = None
    margin_sigmas: float | None = None
    at_risk: bool = False
    verdict: Verdict = Verdict.UNMEASURED

    @property
    def widest_gap(self) -> float | None:
        """The larger of the two gaps: what a flip had to overcome, seen from the side that resists more."""
        if self.gap is None or self.model_gap is None:
            return None
        return max(self.gap, self.model_gap)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    """JSON has no infinity: a loss beyond float32's exponentials is not there."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Verdict) else value


@dataclass(frozen=True)
class Distribution:
    """A measure over positions. Percentiles are interpolated linearly.

    Attributes:
        count: positions.
        mean: of them.
        error: standard error of the mean; None of fewer than two.
        rms: root mean square.
    """

    count: int
    mean: float
    error: float | None
    rms: float
    minimum: float
    percent_1: float
    percent_5: float
    median: float
    percent_95: float
    percent_99: float
    percent_99_9: float
    maximum: float


@dataclass(frozen=True)
class Summary:
    """All positions together, in the terms of llama.cpp's `llama-perplexity --kl-divergence`.

    Attributes:
        positions: how many were compared.
        same_top: share of positions whose best token is the same.
        same_top_error: its standard error.
        kl: KL(ref || model), in nats.
        probability_change: the model's probability of the token that comes next, less the reference's.
        max_delta: the largest difference of a logit, by position.
        model_perplexity: exp of the mean loss; None where no next token is known.
        ref_perplexity: the reference's.
        log_ratio: ln of the model's perplexity over the reference's.
        log_ratio_error: its standard error, of the losses' differences.
        correlation: of the two sides' losses.
    """

    positions: int
    same_top: float | None
    same_top_error: float | None
    kl: Distribution | None
    probability_change: Distribution | None
    max_delta: Distribution | None
    model_perplexity: float | None
    ref_perplexity: float | None
    log_ratio: float | None
    log_ratio_error: float | None
    correlation: float | None


@dataclass(frozen=True)
class FlipBound:
    """Positions where a flip is within reach, listed from the reference's margins before any flip is looked at.

    Attributes:
        source: where the reach comes from.
        reach: in logits; of several reaches (one for each position) the median. None where nothing gives one.
        listed: indices of the rows whose reference margin lies within it.
        expected: how many flips gaussian gaps of this drift would give, two candidates at each position.
        flips: how many there were.
        caught: how many of them were listed.
        missed: indices of the rows that flipped unlisted.
    """

    source: str
    reach: float | None
    listed: tuple[int, ...]
    expected: float | None
    flips: int
    caught: int
    missed: tuple[int, ...]

    @property
    def recall(self) -> float | None:
        """Share of the flips that were listed; None where there is no flip."""
        return self.caught / self.flips if self.flips else None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "recall": self.recall}


@dataclass(frozen=True)
class FedTokens:
    """What both sides were fed.

    Attributes:
        name: of the probe, or "prompt", "tokens", "text".
        text: the prompt as given; None when ids were given.
        wrap: none, once or twice.
        prompt: the prompt's tokens, or the text's.
        continuation: the tokens after it.
        source: where the continuation comes from; "" without one.
        context: tokens of one piece, for a text that is fed in pieces.
    """

    name: str
    text: str | None
    wrap: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    source: str = ""
    context: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return (*self.prompt, *self.continuation)


@dataclass(frozen=True)
class MarginsReport:
    """The answer of `bisect margins` for one prompt or text."""

    verdict: Verdict
    reason: str
    sides: dict[str, SideInfo]
    fed: FedTokens
    rows: tuple[TokenMargin, ...]
    summary: Summary
    bounds: tuple[FlipBound, ...]
    noise: LogitNoise | None
    findings: tuple[SidedFinding, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def flips(self) -> list[TokenMargin]:
        """The positions whose best tokens differ."""
        return [row for row in self.rows if row.flip]

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.margins/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "fed": {**asdict(self.fed), "prompt": list(self.fed.prompt), "continuation": list(self.fed.continuation)},
            "summary": asdict(self.summary),
            "flip_bounds": [bound.to_json() for bound in self.bounds],
            "noise": None if self.noise is None else self.noise.to_json(),
            "tokens": [row.to_json() for row in self.rows],
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }

    def to_frame(self) -> Any:
        """A row per position as a pandas DataFrame (extra `notebooks`); margins and best tokens flat."""
        import pandas

        return pandas.json_normalize([row.to_json() for row in self.rows], sep="_")

    def top(self, k: int = 10) -> list[TokenMargin]:
        """The k rows that matter most: logits that are not finite, flips by their gap, then the smallest margins."""

        def order(row: TokenMargin) -> tuple[bool, bool, float]:
            if row.ref is None:
                return False, False, 0.0
            return True, not row.flip, -(row.widest_gap or 0.0) if row.flip else row.ref.margin

        return sorted(self.rows, key=order)[:k]

    def __repr__(self) -> str:
        return f"<MarginsReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: the reference's margin at every position, flips marked."""
        from aprjax.bisect.margins.plot import plot_strip

        return plot_strip(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.margins.html import summary_html

        return summary_html(self)
