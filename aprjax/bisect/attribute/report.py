"""What `attribute` reports: every stage's share of the change of one number."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from aprjax.bisect.confidence import Confidence
from aprjax.bisect.report import PromptInfo, SidedFinding, SideInfo, Verdict
from aprjax.qwen2.stages import Stage

SCHEMA = "aprjax.attribute/1"
# Beyond this gap the shares do not add up to what really happened, and nothing is concluded from them. Issue
# "Find the cause" asks for 1 % with 32 steps on a real pair; five times that leaves room for fewer steps.
LARGEST_GAP = 0.05


@dataclass(frozen=True)
class Contribution:
    """One stage's part in the change.

    Attributes:
        layer: its number; -1 for the stages outside the layers.
        stage: whose own error it is.
        integrated: the change that it causes, along the path from the reference to the model.
        first_order: the same from the gradient at the reference alone.
        positions: the token positions with the largest parts, (position, part).
        parts: the heads or channels with the largest parts, (name, part).
        source: "file" where most of it comes from what the two files hold, else "arithmetic".
        tensors: (name, part) of each tensor or config key that the stage reads and that differs.
        infects: the real change when the reference takes on this one error; None where it was not run.
        heals: the real change when the model is rid of this one error.
    """

    layer: int
    stage: Stage
    integrated: float
    first_order: float
    positions: tuple[tuple[int, float], ...]
    parts: tuple[tuple[str, float], ...]
    source: str
    tensors: tuple[tuple[str, float], ...] = ()
    infects: float | None = None
    heals: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "stage": str(self.stage)}


@dataclass(frozen=True)
class CauseShare:
    """One thing in which the two sides differ, and what it adds to the change wherever it acts.

    Attributes:
        kind: "tensor", "config", "arithmetic" (a choice in which the two arithmetics differ), "rounding" (the same
            choices, rounded otherwise) or "unknown" (a trace whose file is not at hand).
        name: the tensor, the config key, or the choice in words.
        sentence: what differs, in a sentence.
        integrated, first_order: the sum of its shares over all stages, as for `Contribution`.
        places: (place, share) of the stages where most of it arises.
        infects: the real change when the reference, run as itself, takes this one thing from the model.
        heals: the real change that goes when the model, run as itself, takes it from the reference.
        next_step: what to do about it.
        confidence: how sure the cause is, and what that rests on.
    """

    kind: str
    name: str
    sentence: str
    integrated: float
    first_order: float
    places: tuple[tuple[str, float], ...]
    infects: float | None
    heals: float | None
    next_step: str
    confidence: Confidence


@dataclass(frozen=True)
class AttributeReport:
    """The answer of `bisect attribute`.

    Attributes:
        verdict: agree where nothing changes or the shares add up, unmeasured where they do not.
        reason: in a sentence.
        metric: what was attributed: "margin" or "kl".
        chosen, rival: by position, the two tokens of the margin.
        ref_value, model_value: of the two sides as they ran.
        steps: gradients along the path.
        contributions: of every (layer, stage) with an error, largest first.
        causes: the same shares added up by what makes them, largest first.
        gap: what the contributions' sum misses of the real change, relative to it.
        first_order_gap: the same of the first-order estimates.
        reconstruction: how far the base network with a side's errors added is from that side, in the metric.
        dtype: of the base network.
        passes: forward and backward passes of the base network.
        sides, prompt, findings: as in `layers`.
        seconds: what it took.
    """

    verdict: Verdict
    reason: str
    metric: str
    chosen: tuple[int, ...]
    rival: tuple[int, ...]
    ref_value: float
    model_value: float
    steps: int
    contributions: tuple[Contribution, ...]
    causes: tuple[CauseShare, ...]
    gap: float
    first_order_gap: float
    reconstruction: float
    dtype: str
    passes: dict[str, int]
    sides: dict[str, SideInfo]
    prompt: PromptInfo
    findings: tuple[SidedFinding, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """Of the metric, from the reference to the model."""
        return self.model_value - self.ref_value

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.attribute/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "metric": {
                "kind": self.metric,
                "chosen": list(self.chosen),
                "rival": list(self.rival),
                "ref": self.ref_value,
                "model": self.model_value,
                "change": self.change,
            },
            "steps": self.steps,
            "gap": self.gap,
            "first_order_gap": self.first_order_gap,
            "reconstruction": self.reconstruction,
            "contributions": [contribution.to_json() for contribution in self.contributions],
            "causes": [asdict(cause) for cause in self.causes],
            "base": {"dtype": self.dtype, **self.passes},
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "prompt": {
                **asdict(self.prompt),
                "tokens": list(self.prompt.tokens),
                "positions": list(self.prompt.positions),
            },
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per (layer, stage)."""
        keys = ("layer", "integrated", "first_order", "source", "infects", "heals")
        return [{"stage": str(c.stage), **{key: getattr(c, key) for key in keys}} for c in self.contributions]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[Contribution]:
        """The k largest contributions, of either sign."""
        return list(self.contributions[:k])

    def by_layer(self) -> dict[int, float]:
        """The contributions summed over each layer's stages."""
        sums: dict[int, float] = {}
        for contribution in self.contributions:
            sums[contribution.layer] = sums.get(contribution.layer, 0.0) + contribution.integrated
        return dict(sorted(sums.items()))

    def __repr__(self) -> str:
        return f"<AttributeReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: from the reference's number to the model's, one bar per share."""
        from aprjax.bisect.attribute.plot import plot_waterfall

        return plot_waterfall(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())
