"""What `identify` finds: one mistake in what a trace is taken for, with its evidence and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from aprjax.bisect.confidence import Confidence
from aprjax.bisect.report import SidedFinding
from aprjax.checkpoint.types import Severity
from aprjax.qwen2.stages import LAYER_STAGES, Stage


@dataclass(frozen=True)
class IdentityFinding:
    """One thing that a trace is, and that its labels, tokens or sidecar do not say.

    Attributes:
        id: a stable slug (`capture-point`, `token-selection`, `bos-prepended`, …).
        sentence: what was found, in words, without a full stop.
        next_step: what to do before anything is compared.
        confidence: the kind of proof, and what it rests on.
        severity: `error` where a comparison would be of different things, `warning` where it would be off,
            `info` where nothing is lost.
        stages: the stages that it is about, in execution order; empty for the whole trace.
        layers: their layers, in order; -1 for the stages outside the layers.
        evidence: numbers and names, as plain JSON values.
    """

    id: str
    sentence: str
    next_step: str
    confidence: Confidence
    severity: Severity = "error"
    stages: tuple[Stage, ...] = ()
    layers: tuple[int, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **asdict(self),
            "confidence": self.confidence.to_json(),
            "stages": [str(stage) for stage in self.stages],
            "layers": list(self.layers),
        }

    def as_sided(self, side: str) -> SidedFinding:
        """For reports that list findings before their ratios."""
        return SidedFinding(f"trace-{self.id}", self.severity, f"{self.sentence}: {self.next_step}", side=side)

    def _repr_html_(self) -> str:
        return (
            f"<p><b>{escape(self.id)}</b> ({self.severity}): {escape(self.sentence)}<br>"
            f"{escape(self.next_step)}<br><small>{escape(self.confidence.sentence())}</small></p>"
        )


def places_in_words(keys: list[tuple[int, Stage]]) -> str:
    """`ffn_swigl of layers 0 to 27; final_norm`."""
    by_stage: dict[Stage, list[int]] = {}
    for layer, stage in keys:
        by_stage.setdefault(stage, []).append(layer)
    same: dict[str, list[Stage]] = {}
    for stage in (s for s in Stage if s in by_stage):
        same.setdefault(layers_in_words(sorted(by_stage[stage])), []).append(stage)
    return "; ".join(f"{_stages(stages)}{f' of {where}' if where else ''}" for where, stages in same.items())


def _stages(stages: list[Stage]) -> str:
    if len(stages) == len(LAYER_STAGES) and set(stages) == set(LAYER_STAGES):
        return "every stage"
    return ", ".join(map(str, stages))


def layers_in_words(layers: list[int]) -> str:
    """`layer 3`, `layers 0 to 5, 9`; empty for the stages outside the layers."""
    inside = [layer for layer in layers if layer >= 0]
    if not inside:
        return ""
    runs: list[list[int]] = []
    for layer in inside:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
    return f"layer{'s' if len(inside) > 1 else ''} {text}"
