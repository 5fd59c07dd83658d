"""What `locate` reports: the places that cause the drift, and every run that was made to find them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from aprjax.bisect.confidence import Confidence
from aprjax.bisect.report import PromptInfo, SidedFinding, SideInfo, Verdict
from aprjax.qwen2.stages import OUTSIDE, Stage

SCHEMA = "aprjax.locate/1"


def place(layer: int, stage: Stage) -> str:
    """Layer and stage in words."""
    return str(stage) if layer == OUTSIDE else f"layer {layer}, {stage}"


@dataclass(frozen=True)
class Run:
    """One run with values put in.

    Attributes:
        question: what was put in where, in words.
        side: which side ran: "model" or "ref".
        drift: how far the result is from the reference's, in the units of `measured`.
        healed: whether that is within what noise explains.
        measured: "logits", or the boundary whose value was compared.
        layers: how many layers were run.
    """

    question: str
    side: str
    drift: float
    healed: bool
    measured: str
    layers: int


@dataclass(frozen=True)
class Parts:
    """The part of a stage's value that carries its difference.

    Attributes:
        kind: "heads", "keys and values" or "channels".
        names: the parts, in words (a head, a range of channels).
        positions: the token positions that differ.
        share: of the squared local difference that lies there.
        of: how many parts there are.
        healed: the share of the drift that goes when the reference's values are put into these parts alone;
            None where that was not run.
    """

    kind: str
    names: tuple[str, ...]
    positions: tuple[int, ...]
    share: float
    of: int
    healed: float | None = None


@dataclass(frozen=True)
class LocatedFault:
    """One place that causes drift, proven by patches.

    Attributes:
        layer: its number; -1 for embedding, final_norm and lm_head.
        stage: whose inputs agree and whose output does not.
        before: the drift with the reference's values put in up to the stage before.
        after: the drift with this stage put in, too.
        measured: what the drift was measured at, see `Run`.
        infects: the drift that the reference takes on when the model's value is put into it at this stage
            alone; None where the reference cannot be run.
        parts: what part of the value it is; None where it is all of it.
        cause: in a sentence.
        next_step: what to do about it.
        confidence: how sure the cause is, and what that rests on; the place itself is proven by the runs.
    """

    layer: int
    stage: Stage
    before: float
    after: float
    measured: str
    infects: float | None
    parts: Parts | None
    cause: str
    next_step: str
    confidence: Confidence

    @property
    def healed(self) -> float:
        """The share of the drift before it that goes with it."""
        return 1.0 - self.after / self.before if self.before else 0.0

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        finite = {key: _finite(value) for key in ("before", "after", "infects") for value in [getattr(self, key)]}
        return {**asdict(self), **finite, "stage": str(self.stage), "healed": self.healed}


@dataclass(frozen=True)
class ChoiceEffect:
    """What one choice of the arithmetics does to the logits, switched in all layers at once.

    Attributes:
        name: of the choice.
        model, ref: what either side does, in words.
        before: the drift as it is.
        after: the drift with the reference's choice in the model.
        infects: the drift that the reference takes on with the model's choice; None where it cannot be run.
    """

    name: str
    model: str
    ref: str
    before: float
    after: float
    infects: float | None

    def sentence(self) -> str:
        """In words, without a full stop."""
        reverse = "" if self.infects is None else f", and put into the reference it makes {self.infects:.3g}"
        return (
            f"{self.model} in the model, {self.ref} in the reference: put right in all layers, the drift falls from "
            f"{self.before:.3g} to {self.after:.3g}{reverse}"
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        finite = {key: _finite(value) for key in ("before", "after", "infects") for value in [getattr(self, key)]}
        return {**asdict(self), **finite}


@dataclass(frozen=True)
class LocateReport:
    """The answer of `bisect locate`.

    Attributes:
        verdict: agree, divergence or unmeasured.
        reason: in a sentence.
        faults: in execution order.
        drift: of the model's logits from the reference's: the standard deviation over the vocabulary of
            their difference, root mean square over the positions.
        floor: the drift that noise explains; 0 where both sides must be equal to the bit.
        floor_basis: where the floor comes from.
        choices: what single choices do in all layers at once, where the two arithmetics differ.
        half_at: the boundary (the layer's number) at which half of a spread drift has come together; None
            where there are places to name, or nothing to locate.
        flips: positions whose best token differs.
        sides, prompt, findings: as in `layers`.
        runs: every run.
        passes: by side: runs, and the whole forward passes that their layers amount to.
        seconds: what it took.
    """

    verdict: Verdict
    reason: str
    faults: tuple[LocatedFault, ...]
    drift: float
    floor: float
    floor_basis: str
    choices: tuple[ChoiceEffect, ...]
    half_at: int | None
    flips: int
    sides: dict[str, SideInfo]
    prompt: PromptInfo
    findings: tuple[SidedFinding, ...]
    runs: tuple[Run, ...]
    passes: dict[str, dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.locate/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "faults": [fault.to_json() for fault in self.faults],
            "drift": _finite(self.drift),
            "floor": self.floor,
            "floor_basis": self.floor_basis,
            "choices": [choice.to_json() for choice in self.choices],
            "half_at": self.half_at,
            "flips": self.flips,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "prompt": {
                **asdict(self.prompt),
                "tokens": list(self.prompt.tokens),
                "positions": list(self.prompt.positions),
            },
            "findings": [finding.to_json() for finding in self.findings],
            "runs": [{**asdict(run), "drift": _finite(run.drift)} for run in self.runs],
            "passes": self.passes,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per run, in the order in which they were made."""
        return [asdict(run) for run in self.runs]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[LocatedFault]:
        """The k places that cause most."""
        return sorted(self.faults, key=lambda fault: -fault.before)[:k]

    def __repr__(self) -> str:
        return f"<LocateReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: every run's drift, and whether the values put in took it away."""
        from aprjax.bisect.locate.plot import plot_runs

        return plot_runs(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a drift that is not finite is not there."""
    return value if value is not None and abs(value) < float("inf") else None
