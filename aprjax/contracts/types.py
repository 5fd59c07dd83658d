"""The words of contracts: what is promised (`schema`), and what a check of it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from aprjax.contracts.schema import (
    Contract,
    ContractStatus,
    Equation,
    EvidenceFile,
    FalsificationTest,
    KaniHarness,
    Kind,
    LayerStep,
    Metadata,
    ObligationType,
    ProofObligation,
    QaGate,
    TestStatus,
    Threshold,
)

__all__ = [
    "NOT_ABOUT",
    "SCHEMA",
    "CheckReport",
    "CheckedSide",
    "Contract",
    "ContractStatus",
    "Equation",
    "EvidenceFile",
    "FalsificationTest",
    "KaniHarness",
    "Kind",
    "LayerStep",
    "Measured",
    "Metadata",
    "ObligationType",
    "ProofObligation",
    "QaGate",
    "Status",
    "TestOutcome",
    "TestStatus",
    "Threshold",
]

SCHEMA = "aprjax.check/1"
# How the reason begins of a test that its contract declares `not_applicable`.
NOT_ABOUT = "not about these two sides: "


class Status(StrEnum):
    """What became of a falsification test. Unmeasured is neither passed nor failed, and is never counted as passed."""

    PASS = "pass"
    FAIL = "fail"
    UNMEASURED = "unmeasured"


Measured = Mapping[str, float | int | str | bool | None]


@dataclass(frozen=True)
class TestOutcome:
    """What one falsification test found.

    Attributes:
        contract_id: of its contract.
        test_id: its own.
        status: pass, fail or unmeasured.
        reason: why, in a sentence that names the deciding number, its bound and where it was found.
        rule: the test's rule, so that an outcome can be read alone.
        measured: what was measured, by name; the thresholds speak of these names.
        thresholds: the bounds it was held to.
        command: what repeats this one measurement.
        seconds: wall time of this test's own work; work that tests share counts once, with the first.
        artifacts: names of files in `CheckReport.artifacts` that hold the raw output.
    """

    __test__ = False  # pytest must not take it for a class of tests

    contract_id: str
    test_id: str
    status: Status
    reason: str
    rule: str = ""
    measured: Measured = field(default_factory=dict)
    thresholds: tuple[Threshold, ...] = ()
    command: str = ""
    seconds: float = 0.0
    artifacts: tuple[str, ...] = ()

    @property
    def threshold(self) -> str:
        """The bounds as text; empty where the rule has no number."""
        return "; ".join(map(str, self.thresholds))

    @property
    def basis(self) -> str:
        """Where the bounds come from, each once."""
        return "; ".join(dict.fromkeys(threshold.basis for threshold in self.thresholds))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **asdict(self),
            "status": str(self.status),
            "measured": dict(self.measured),
            "threshold": self.threshold,
            "basis": self.basis,
            "thresholds": [asdict(threshold) for threshold in self.thresholds],
            "seconds": round(self.seconds, 3),
            "artifacts": list(self.artifacts),
        }


@dataclass(frozen=True)
class CheckedSide:
    """One side of a check.

    Attributes:
        text: as the user gave it.
        path: of the file.
        sha256: of the file; None where there is none (a folder of another engine).
        nbytes: its size in bytes.
        format: gguf, apr or safetensors, or the engine's name.
        arithmetic: how it was run.
        architecture: of the model.
        tensors: how many the file holds.
    """

    text: str
    path: str
    sha256: str | None
    nbytes: int | None
    format: str
    arithmetic: str
    architecture: str = "qwen2"
    tensors: int | None = None


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`.

    Attributes:
        outcomes: one per falsification test, in the contracts' order.
        sides: `model` and `ref`.
        contracts: those that were checked.
        command: what repeats it.
        started: when it began, UTC, ISO 8601.
        seconds: wall time of all of it.
        artifacts: raw outputs, by file name: what the outcomes' numbers were taken from.
        allowed: ids that may stay unmeasured, by the user's word.
    """

    outcomes: tuple[TestOutcome, ...]
    sides: Mapping[str, CheckedSide]
    contracts: tuple[Contract, ...] = ()
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    artifacts: Mapping[str, str] = field(default_factory=dict, repr=False)
    allowed: tuple[str, ...] = ()

    @property
    def not_applicable(self) -> frozenset[str]:
        """Tests that their contract declares to be about something else than two sides."""
        return frozenset(t.id for c in self.contracts for t in c.falsification_tests if t.not_applicable)

    @property
    def required(self) -> tuple[TestOutcome, ...]:
        """The outcomes that the exit code waits for."""
        free = {*self.allowed, *self.not_applicable}
        return tuple(outcome for outcome in self.outcomes if outcome.test_id not in free)

    def count(self, status: Status) -> int:
        """How many tests ended so."""
        return sum(outcome.status is status for outcome in self.outcomes)

    @property
    def exit_code(self) -> int:
        """1 with a failure; 3 where something was left unmeasured that was not allowed to be; 0 otherwise."""
        if self.count(Status.FAIL):
            return 1
        missing = any(outcome.status is Status.UNMEASURED for outcome in self.required)
        return 3 if missing or not self.count(Status.PASS) else 0

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.check/1`."""
        return {
            "schema": SCHEMA,
            "passed": self.count(Status.PASS),
            "failed": self.count(Status.FAIL),
            "unmeasured": self.count(Status.UNMEASURED),
            "not_applicable": sorted(self.not_applicable),
            "allowed_unmeasured": list(self.allowed),
            "exit_code": self.exit_code,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "contracts": [
                {"id": c.id, "version": c.metadata.version, "kind": c.metadata.kind, "status": c.metadata.status}
                for c in self.contracts
            ],
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
            "command": self.command,
            "started": self.started,
            "seconds": round(self.seconds, 3),
        }

    def to_frame(self) -> Any:
        """A row per test as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([outcome.to_json() for outcome in self.outcomes])

    def top(self, k: int = 10) -> list[TestOutcome]:
        """The k outcomes that matter most: failures, then what was not measured, then passes."""
        order = [Status.FAIL, Status.UNMEASURED, Status.PASS]
        return sorted(self.outcomes, key=lambda outcome: order.index(outcome.status))[:k]

    def _repr_html_(self) -> str:
        from aprjax.contracts.html import summary_html

        return summary_html(self)
