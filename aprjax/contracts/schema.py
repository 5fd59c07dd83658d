"""The schema of a contract: what is promised, the tests that could break the promise, and their bounds.

It is upstream's (paiml's `pv`, contracts.md sections 1.1 and 7). What upstream drops while reading (statuses,
evidence, discharge) is part of it here, and so are two things of our own: every threshold is data with its
basis, and every evidence file has its SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "kernel",
    "registry",
    "model-family",
    "model-family-variant",
    "tokenizer",
    "training-loop",
    "pretraining-corpus",
    "training-precondition-gate",
    "corpus-assembly",
    "pattern",
    "schema",
    "beat-benchmark",
    "kaizen",
]
ContractStatus = Literal[
    "DRAFT", "PROPOSED", "ACTIVE_ALGORITHM_LEVEL", "ACTIVE_FUNCTIONAL", "ACTIVE", "FUNCTIONAL", "IMPLEMENTED", "demoted"
]
TestStatus = Literal[
    "PROPOSED",
    "BLOCKER_FIXTURE_ABSENT",
    "PARTIAL_ALGORITHM_LEVEL",
    "ALGORITHM_LEVEL_DISCHARGED",
    "FUNCTIONAL",
    "DISCHARGED",
]
ObligationType = Literal[
    "invariant",
    "equivalence",
    "bound",
    "monotonicity",
    "idempotency",
    "linearity",
    "symmetry",
    "associativity",
    "conservation",
    "ordering",
    "completeness",
    "soundness",
    "involution",
    "determinism",
    "roundtrip",
    "state_machine",
    "classification",
    "independence",
    "termination",
    "precondition",
    "postcondition",
    "frame",
    "loop_invariant",
    "loop_variant",
    "old_state",
    "subcontract",
]


@dataclass(frozen=True)
class Threshold:
    """A bound that a measure must keep, and where the bound comes from.

    Attributes:
        measure: name of the number in `TestOutcome.measured`.
        basis: where the bound comes from: a source, a measurement or an argument; never empty.
        minimum: the measure must not be below; None for no such bound.
        maximum: nor above.
        equals: it must be exactly this.
        unit: of the measure; empty for a ratio or a count.
    """

    measure: str
    basis: str
    minimum: float | None = None
    maximum: float | None = None
    equals: float | str | bool | None = None
    unit: str = ""

    def holds(self, value: float | str | bool | None) -> bool:
        """Whether a measured value keeps it; a value that is no number (None, NaN) keeps nothing."""
        if value is None:
            return False
        if self.equals is not None:
            return value == self.equals
        if isinstance(value, str):
            return False
        low = self.minimum is None or value >= self.minimum
        high = self.maximum is None or value <= self.maximum
        return low and high

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.equals is not None:
            plain = f"{self.equals:g}" if type(self.equals) in (int, float) else str(self.equals).lower()
            return f"{self.measure} = {self.equals if isinstance(self.equals, str) else plain}{unit}"
        if self.minimum is not None and self.maximum is not None:
            return f"{self.measure} in [{self.minimum:g}, {self.maximum:g}]{unit}"
        if self.minimum is not None:
            return f"{self.measure} ≥ {self.minimum:g}{unit}"
        return f"{self.measure} ≤ {self.maximum:g}{unit}"


@dataclass(frozen=True)
class EvidenceFile:
    """A committed file that a status stands on: path from the repository's root, and its SHA-256."""

    path: str
    sha256: str


@dataclass(frozen=True)
class FalsificationTest:
    """A test that could prove the contract wrong.

    Attributes:
        id: upstream's where it tests the same rule.
        rule: what must hold, in a sentence.
        prediction: what will be observed if it does.
        if_fails: what a failure means, and where to look.
        test: the bound test's command: `python3 -m pytest tests/…::test_…`.
        thresholds: the bounds that decide, each with its basis.
        status: of the lifecycle; None where the contract's own status says enough.
        evidence_discharged_by: names of what discharged it; a path may be followed by a remark in parentheses.
        evidence: committed files that the status stands on.
        ship_blocking: whether a release waits for it.
    """

    id: str
    rule: str
    prediction: str
    if_fails: str
    test: str | None = None
    name: str | None = None
    test_harness: str | None = None
    thresholds: tuple[Threshold, ...] = ()
    description: str | None = None
    status: TestStatus | None = None
    discharge_status: TestStatus | None = None
    previous_status: TestStatus | None = None
    binds_to: str | None = None
    evidence_discharged_by: tuple[str, ...] = ()
    evidence: tuple[EvidenceFile, ...] = ()
    partial_discharge_note: str | None = None
    full_discharge_blocks_on: str | None = None
    ship_blocking: bool | None = None
    not_applicable: bool = False
    na_reason: str | None = None
    na_owner: str | None = None

    def threshold(self, measure: str) -> Threshold:
        """The bound of a measure.

        Raises:
            KeyError: the contract bounds no such measure.
        """
        for threshold in self.thresholds:
            if threshold.measure == measure:
                return threshold
        raise KeyError(f"{self.id} has no threshold for {measure!r}")


@dataclass(frozen=True)
class Equation:
    """What a contract says in a formula."""

    formula: str
    domain: str | None = None
    codomain: str | None = None
    invariants: tuple[str, ...] = ()
    preconditions: tuple[str, ...] = ()
    postconditions: tuple[str, ...] = ()
    lean_theorem: str | None = None
    float_tolerance: float | None = None
    assumes: tuple[str, ...] = ()
    guarantees: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProofObligation:
    """A property that somebody has to show."""

    type: ObligationType
    property: str
    formal: str | None = None
    tolerance: float | None = None
    applies_to: str | None = None
    lean: Mapping[str, Any] | None = None
    requires: str | None = None
    applies_to_phase: str | None = None
    parent_contract: str | None = None
    id: str | None = None
    na_reason: str | None = None
    na_owner: str | None = None


@dataclass(frozen=True)
class LayerStep:
    """One step of a transformer layer and what it may differ by: `tolerance_abs + tolerance_rel * |reference|`."""

    name: str
    tolerance_abs: float
    tolerance_rel: float
    input: str | None = None
    output: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class KaniHarness:
    """A bounded proof; upstream's are Rust, ours name the property test that stands in its place."""

    id: str
    obligation: str
    property: str | None = None
    bound: int | None = None
    strategy: Literal["exhaustive", "stub_float", "compositional", "bounded_int"] | None = None
    solver: str | None = None
    harness: str | None = None


@dataclass(frozen=True)
class QaGate:
    """The gate that a contract's tests make up together."""

    id: str
    name: str
    description: str | None = None
    checks: tuple[str, ...] = ()
    pass_criteria: str | None = None
    falsification: str | None = None


@dataclass(frozen=True)
class Metadata:
    """What a contract is about, who says so, and how far it has come."""

    version: str
    description: str
    references: tuple[str, ...] = ()
    id: str | None = None
    status: ContractStatus | None = None
    created: str | None = None
    updated: str | None = None
    author: str | None = None
    depends_on: tuple[str, ...] = ()
    registry: bool = False
    kind: Kind = "kernel"
    enforcement_level: Literal["basic", "standard", "strict", "proven"] | None = None
    locked_level: str | None = None
    binds_to: str | tuple[str, ...] | None = None
    changelog: Any = None


@dataclass(frozen=True)
class Contract:
    """A contract file.

    Attributes:
        id: the file's name without `.yaml`: what `depends_on` names.
        path: of the file.
        metadata: version, kind, status, references.
        equations: by name.
        proof_obligations: what has to be shown.
        falsification_tests: what could prove it wrong.
        layer_steps: of `layer-parity-v1`: the steps of a layer with their tolerances.
        lines: line (from 1) of every key and item in the file, by its path: `("metadata", "status")`,
            `("falsification_tests", 0, "test")`.
    """

    id: str
    path: Path
    metadata: Metadata
    equations: Mapping[str, Equation] = field(default_factory=dict)
    proof_obligations: tuple[ProofObligation, ...] = ()
    falsification_tests: tuple[FalsificationTest, ...] = ()
    kani_harnesses: tuple[KaniHarness, ...] = ()
    qa_gate: QaGate | None = None
    layer_steps: tuple[LayerStep, ...] = ()
    kernel_structure: Any = None
    simd_dispatch: Any = None
    enforcement: Any = None
    verification_summary: Any = None
    type_invariants: Any = None
    coq_spec: Any = None
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict, repr=False, compare=False)

    def line(self, *path: str | int) -> int:
        """The line of a place in the file, or of the nearest one around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 1
