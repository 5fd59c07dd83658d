"""What `layers` reports: frozen dataclasses that show themselves as JSON, frame, HTML or the worst few."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from aprjax.bisect.confidence import Confidence
from aprjax.bisect.metrics import Distance
from aprjax.bisect.spread import Spread
from aprjax.checkpoint.types import Finding
from aprjax.qwen2.stages import Stage

SCHEMA = "aprjax.layers/1"
# The finding that alone makes a verdict unmeasured: everything that a trace holds agrees, and it does not hold all.
VALUES_LACKING = "values-lacking"


class Verdict(StrEnum):
    """What a comparison came to, in the order of exit codes 0, 0, 1, 3."""

    AGREE = "agree"
    NEAR_TIE = "near-tie"
    DIVERGENCE = "divergence"
    UNMEASURED = "unmeasured"

    @property
    def exit_code(self) -> int:
        """0 agree or near-tie, 1 divergence, 3 unmeasured."""
        return {Verdict.AGREE: 0, Verdict.NEAR_TIE: 0, Verdict.DIVERGENCE: 1, Verdict.UNMEASURED: 3}[self]


@dataclass(frozen=True)
class SidedFinding(Finding):
    """A finding together with the side it was met on."""

    side: str = ""


def sided(finding: Finding, side: str) -> SidedFinding:
    """The finding, marked with its side."""
    return SidedFinding(**{**asdict(finding), "side": side})


@dataclass(frozen=True)
class SideInfo:
    """What one side was: file, format, and the arithmetic that ran it."""

    path: str
    sha256: str
    format: str
    arithmetic: str


@dataclass(frozen=True)
class PromptInfo:
    """What both sides were fed, and which positions were compared."""

    name: str
    text: str | None
    wrap: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class StageReport:
    """One stage of one layer, compared.

    Attributes:
        distance: the free-running sides compared.
        local_rel_l2: relative L2 of the model's stage computed *from the reference's inputs*: what the
            stage adds by itself, free of what it inherits.
        tolerance: the local difference that rounding alone explains here (None where the local
            difference is zero and none was needed).
        arithmetic_rel_l2: the part of the local difference that the reference's own file shows when it
            runs under the model's arithmetic (None when both sides use one arithmetic).
        massive_channels: channels set aside for `without_massive`.
        without_massive: the distance without them; None where there are none.
        unmeasured: why the stage was not compared; empty where it was.
        spreads: where the "free" (running) and the "local" difference lie; None where there is none. Empty where
            the stage was not compared.
    """

    distance: Distance
    local_rel_l2: float | None
    tolerance: float | None = None
    arithmetic_rel_l2: float | None = None
    massive_channels: tuple[int, ...] = ()
    without_massive: Distance | None = None
    unmeasured: str = ""
    spreads: dict[str, Spread | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The contract's keys, flat."""
        return {
            **self.distance.to_json(),
            "local_rel_l2": self.local_rel_l2,
            "tolerance": self.tolerance,
            "arithmetic_rel_l2": self.arithmetic_rel_l2,
            "massive_channels": list(self.massive_channels),
            "without_massive": None if self.without_massive is None else self.without_massive.to_json(),
            "unmeasured": self.unmeasured or None,
            "spread": {name: None if spread is None else spread.to_json() for name, spread in self.spreads.items()},
        }


@dataclass(frozen=True)
class LayerReport:
    """The stages of one layer; layer -1 holds embedding, final_norm and lm_head."""

    layer: int
    stages: dict[Stage, StageReport]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {"layer": self.layer, "stages": {str(s): r.to_json() for s, r in self.stages.items()}}


@dataclass(frozen=True)
class SideMargin:
    """The two best tokens at a position, and how far apart their logits are."""

    top1: int
    top2: int
    margin: float


@dataclass(frozen=True)
class MarginReport:
    """Both sides' margins at one position.

    `gap` is the reference's logit of its own choice minus that of the model's choice: zero without a
    flip, and what a flip had to overcome with one. `kl` is `KL(ref || model)` in nats.
    """

    position: int
    model: SideMargin
    ref: SideMargin
    flip: bool
    gap: float
    kl: float
    rms_delta: float
    max_delta: float


@dataclass(frozen=True)
class FirstDivergence:
    """Where two sides part first, in execution order, and why.

    Attributes:
        layer: its number; -1 for embedding, final_norm and lm_head.
        stage: whose inputs agree and whose output does not.
        cause: in a sentence.
        next_step: what to do about it.
        confidence: how sure the cause is, and what that rests on; None where there is only the place.
    """

    layer: int
    stage: Stage
    cause: str
    next_step: str = ""
    confidence: Confidence | None = None


@dataclass(frozen=True)
class LayersReport:
    """The answer of `bisect layers` for one prompt."""

    verdict: Verdict
    reason: str
    first_divergence: FirstDivergence | None
    sides: dict[str, SideInfo]
    prompt: PromptInfo
    findings: tuple[SidedFinding, ...]
    layers: tuple[LayerReport, ...]
    margins: tuple[MarginReport, ...]
    noise: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    token_texts: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.layers/1`; `token_texts` has the fed and chosen tokens, by id, where known."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "first_divergence": None if self.first_divergence is None else asdict(self.first_divergence),
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "prompt": {
                **asdict(self.prompt),
                "tokens": list(self.prompt.tokens),
                "positions": list(self.prompt.positions),
            },
            "findings": [finding.to_json() for finding in self.findings],
            "layers": [layer.to_json() for layer in self.layers],
            "margins": [asdict(margin) for margin in self.margins],
            "noise": self.noise,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
            "token_texts": {str(token): text for token, text in self.token_texts.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per (layer, stage), in execution order."""
        rows = []
        for layer in self.layers:
            for stage, report in layer.stages.items():
                values = report.to_json()
                del values["without_massive"], values["spread"]
                rows.append({"layer": layer.layer, "stage": str(stage), **values})
        return rows

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k rows with the largest local difference."""
        return sorted(self.rows(), key=lambda row: -(row["local_rel_l2"] or 0.0))[:k]

    def __repr__(self) -> str:
        return f"<LayersReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: heat maps layers × stages, and the ratio of standard deviations by layer."""
        from aprjax.bisect.layers.plots import plot_report

        return plot_report(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.layers.html import summary_html

        return summary_html(self)
