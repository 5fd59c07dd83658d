"""What `generate` reports: two continuations, where they part, and whether noise explains it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from aprjax.bisect.report import PromptInfo, SidedFinding, SideInfo, SideMargin, Verdict
from aprjax.trace.generation import Passes, Stop

SCHEMA = "aprjax.generate/1"


class Kind(StrEnum):
    """How two continuations can part."""

    TOKEN = "another token"
    STOP = "one side stops"
    NOT_FINITE = "logits that are no numbers"


@dataclass(frozen=True)
class Continuation:
    """One side's greedy continuation.

    Attributes:
        tokens: its token ids, a stop token included.
        text: of all of them, special tokens spelled out; None where no file has a vocabulary.
        rest: the text from the first difference on; the whole characters before it are common.
        stop: why it ended.
        passes: what this side computed for it.
    """

    tokens: tuple[int, ...]
    text: str | None
    rest: str | None
    stop: Stop
    passes: Passes

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        passes = {**asdict(self.passes), "seconds": round(self.passes.seconds, 3)}
        return {**asdict(self), "tokens": list(self.tokens), "stop": str(self.stop), "passes": passes}


@dataclass(frozen=True)
class View:
    """How one side sees a step at which the two choose differently.

    Attributes:
        margin: its two best tokens; None where its logits are not finite.
        rank: of the other side's choice, from 1; None likewise.
        gap: its logit of its own choice less that of the other's; None likewise.
    """

    margin: SideMargin | None
    rank: int | None
    gap: float | None


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which the two continuations differ.

    Attributes:
        step: from 0, the first new token.
        position: of the token whose logits decide: the last one that both were fed.
        kind: what differs.
        model: how the model sees it.
        ref: how the reference sees it.
        pieces: the two choices as text, the model's first; None without a vocabulary.
        verdict: near-tie or divergence.
        confirmed: how the model's choice was computed: in one pass over the reference's tokens, or step by step.
        gap_in_sigmas: the larger of the two gaps in the noise's sigma; None where there is no ratio.
    """

    step: int
    position: int
    kind: Kind
    model: View
    ref: View
    pieces: tuple[str, str] | None
    verdict: Verdict
    confirmed: str
    gap_in_sigmas: float | None

    @property
    def gap(self) -> float | None:
        """The larger of the two gaps: what noise has to explain."""
        gaps = [view.gap for view in (self.model, self.ref) if view.gap is not None]
        return max(gaps, default=None)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **asdict(self),
            "kind": str(self.kind),
            "pieces": None if self.pieces is None else list(self.pieces),
            "verdict": str(self.verdict),
            "gap": self.gap,
        }


@dataclass(frozen=True)
class Step:
    """A step of the common part: both sides choose the same token.

    Attributes:
        step: from 0.
        position: of the token whose logits decide.
        token: what both choose.
        piece: the same as text; None without a vocabulary.
        model_margin: how far the model's second choice is behind, in logits; None where logits are not finite.
        ref_margin: the same of the reference.
    """

    step: int
    position: int
    token: int
    piece: str | None
    model_margin: float | None
    ref_margin: float | None


@dataclass(frozen=True)
class GenerateReport:
    """The answer of `generate` for one prompt.

    Attributes:
        verdict: agree, near-tie, divergence or unmeasured.
        reason: why, in a sentence.
        first_difference: where they part; None where they do not.
        sides: what each side is.
        prompt: what both were fed; its positions are those whose logits were compared.
        max_new_tokens: how long a continuation could get.
        ignore_stop: whether both went on after stop tokens.
        common_text: what both say before they part; None without a vocabulary.
        continuations: by side.
        steps: the common part, step by step.
        shared: why one computation serves both sides; empty where each computes.
        close_steps: steps of the common part at which a margin lies within the noise: there the order of sums
            could have decided otherwise. None where the noise was not measured.
        noise: how the noise was measured; None where no difference asked for it.
        engines: version, features and options of what ran outside aprjax, by side.
        findings: what was met on the way.
        seconds: by phase.
    """

    verdict: Verdict
    reason: str
    first_difference: FirstDifference | None
    sides: dict[str, SideInfo]
    prompt: PromptInfo
    max_new_tokens: int
    ignore_stop: bool
    common_text: str | None
    continuations: dict[str, Continuation]
    steps: tuple[Step, ...]
    shared: str = ""
    close_steps: tuple[int, ...] | None = None
    noise: dict[str, Any] | None = None
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: tuple[SidedFinding, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def smallest_margin(self) -> float | None:
        """The smallest margin of either side in the common part, in logits."""
        margins = (m for step in self.steps for m in (step.model_margin, step.ref_margin) if m is not None)
        return min(margins, default=None)

    @property
    def next_step(self) -> str:
        """What to do about a divergence; empty where there is nothing to."""
        first = self.first_difference
        if first is None or first.verdict is not Verdict.DIVERGENCE or first.kind is Kind.STOP:
            return ""
        return (
            "`python -m bisect layers` on the tokens before it names the stage: --tokens with the JSON's "
            f"`prompt.tokens` and the first {first.step} of `continuations.ref.tokens`"
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.generate/1`."""
        first = self.first_difference
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "next_step": self.next_step or None,
            "first_difference": None if first is None else first.to_json(),
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "prompt": {
                **asdict(self.prompt),
                "tokens": list(self.prompt.tokens),
                "positions": list(self.prompt.positions),
            },
            "max_new_tokens": self.max_new_tokens,
            "ignore_stop": self.ignore_stop,
            "common_tokens": len(self.steps),
            "common_text": self.common_text,
            "smallest_margin": self.smallest_margin,
            "continuations": {name: side.to_json() for name, side in self.continuations.items()},
            "steps": self.rows(),
            "shared": self.shared or None,
            "close_steps": None if self.close_steps is None else list(self.close_steps),
            "noise": self.noise,
            "engines": self.engines,
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per step of the common part."""
        return [asdict(step) for step in self.steps]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k steps of the common part with the smallest margins."""

        def smaller(row: dict[str, Any]) -> float:
            return min((row[key] for key in ("model_margin", "ref_margin") if row[key] is not None), default=0.0)

        return sorted(self.rows(), key=smaller)[:k]

    def __repr__(self) -> str:
        return f"<GenerateReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: both sides' margins at every step of the common part."""
        from aprjax.bisect.generate.plot import plot_report

        return plot_report(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.generate.html import summary_html

        return summary_html(self)
