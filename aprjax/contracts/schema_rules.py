"""Upstream's rules of the schema (`pv validate`, contracts.md section 7) and what its reader does not look at.

SCHEMA-018 to SCHEMA-020 concern the file's keys and are found while it is read (`load`, `yaml_reader`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aprjax.contracts.problems import Problem, Severity
from aprjax.contracts.types import Contract, FalsificationTest, ProofObligation

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPS = ("loop_invariant", "loop_variant")


class _Judge:
    """Collects problems of one contract."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.problems: list[Problem] = []

    def say(self, rule: str, message: str, *place: str | int, severity: Severity = "error") -> None:
        """Adds a problem at a place in the file."""
        self.problems.append(Problem(self.contract.path, self.contract.line(*place), rule, message, severity))


def judge_contract(contract: Contract) -> list[Problem]:
    """What one contract breaks of the schema's rules."""
    judge = _Judge(contract)
    _metadata(judge)
    if contract.metadata.kind == "kernel" and not contract.metadata.registry:
        _kernel(judge)
    _obligations(judge)
    _tests(judge)
    _harnesses(judge)
    return judge.problems


def _metadata(judge: _Judge) -> None:
    metadata = judge.contract.metadata
    if not metadata.references or not all(reference.strip() for reference in metadata.references):
        judge.say("SCHEMA-001", "references: a contract cites at least one source", "metadata", "references")
    if not metadata.version.strip():
        judge.say("SCHEMA-002", "version is empty", "metadata", "version")
    if metadata.id is not None and metadata.id != judge.contract.id:
        text = f"id is {metadata.id!r}, the file's name says {judge.contract.id!r}"
        judge.say("CONTRACT-ID", text, "metadata", "id", severity="warning")


def _kernel(judge: _Judge) -> None:
    contract = judge.contract
    if not contract.equations:
        judge.say("SCHEMA-003", "a kernel contract has at least one equation", "equations")
    for name, equation in contract.equations.items():
        if not equation.formula.strip():
            judge.say("SCHEMA-004", f"the formula of {name!r} is empty", "equations", name, "formula")
    if contract.qa_gate is None:
        judge.say("SCHEMA-013", "there is no qa_gate", severity="warning")
    empty = [
        name for name in ("proof_obligations", "falsification_tests", "kani_harnesses") if not getattr(contract, name)
    ]
    if empty:
        judge.say("PROVABILITY-001", f"a kernel contract has {', '.join(empty)}: there are none")
    tests, obligations = len(contract.falsification_tests), len(contract.proof_obligations)
    if tests < obligations:
        text = f"{tests} falsification tests for {obligations} proof obligations: a kernel has as many at least"
        judge.say("PROVABILITY-001", text, "falsification_tests")


def _obligations(judge: _Judge) -> None:
    formals: dict[str, int] = {}
    for index, obligation in enumerate(judge.contract.proof_obligations):
        place = ("proof_obligations", index)
        if not obligation.property.strip():
            judge.say("SCHEMA-005", "the property of an obligation is empty", *place, "property")
        if obligation.formal is not None:
            first = formals.setdefault(obligation.formal, index)
            if first != index:
                text = f"the same formal statement as obligation {first}"
                judge.say("SCHEMA-006", text, *place, "formal", severity="warning")
        _design_by_contract(judge, obligation, place)
        _not_applicable(judge, obligation, place, obligation.applies_to == "not_applicable")


def _design_by_contract(judge: _Judge, obligation: ProofObligation, place: tuple[str, int]) -> None:
    if obligation.requires is not None and obligation.type != "postcondition":
        judge.say("SCHEMA-014", f"`requires` belongs to a postcondition, not to {obligation.type}", *place, "requires")
    if obligation.applies_to_phase is not None and obligation.type not in _LOOPS:
        text = f"`applies_to_phase` belongs to a loop's obligations, not to {obligation.type}"
        judge.say("SCHEMA-015", text, *place, "applies_to_phase")
    parent = obligation.parent_contract
    if parent is not None and obligation.type != "subcontract":
        text = f"`parent_contract` belongs to a subcontract, not to {obligation.type}"
        judge.say("SCHEMA-016", text, *place, "parent_contract")
    elif parent is not None and parent not in judge.contract.metadata.depends_on:
        judge.say("SCHEMA-017", f"the parent {parent!r} is not in depends_on", *place, "parent_contract")


def _not_applicable(
    judge: _Judge, item: ProofObligation | FalsificationTest, place: tuple[str, int], applies: bool
) -> None:
    """Upstream's rule for obligations; ours holds tests to it, too."""
    if applies:
        for rule, key in (("SCHEMA-021", "na_reason"), ("SCHEMA-022", "na_owner")):
            if not (getattr(item, key) or "").strip():
                judge.say(rule, f"what is not applicable needs {key}: why it is not, and who checks it", *place, key)
        return
    for key in ("na_reason", "na_owner"):
        if getattr(item, key) is not None:
            judge.say("SCHEMA-023", f"{key} without not_applicable justifies nothing", *place, key)


def _tests(judge: _Judge) -> None:
    for index, test in enumerate(judge.contract.falsification_tests):
        place = ("falsification_tests", index)
        if not test.prediction.strip():
            judge.say("SCHEMA-008", f"{test.id}: the prediction is empty", *place, "prediction")
        if not test.if_fails.strip():
            judge.say("SCHEMA-009", f"{test.id}: if_fails is empty", *place, "if_fails", severity="warning")
        _not_applicable(judge, test, place, test.not_applicable)
        _thresholds(judge, test, place)
        for number, evidence in enumerate(test.evidence):
            if not _SHA256.fullmatch(evidence.sha256):
                text = f"{test.id}: {evidence.sha256!r} is no SHA-256 (64 lower-case hexadecimal digits)"
                judge.say("EVIDENCE-SHA256", text, *place, "evidence", number, "sha256")
    _once(judge, "falsification_tests", "SCHEMA-007")


def _thresholds(judge: _Judge, test: FalsificationTest, place: tuple[str, int]) -> None:
    seen: set[str] = set()
    for number, threshold in enumerate(test.thresholds):
        here = (*place, "thresholds", number)
        name = f"{test.id}: the threshold of {threshold.measure!r}"
        bounds = (threshold.minimum, threshold.maximum, threshold.equals)
        if all(bound is None for bound in bounds):
            judge.say("CONTRACT-THRESHOLD", f"{name} has no bound (minimum, maximum or equals)", *here)
        if threshold.equals is not None and (threshold.minimum is not None or threshold.maximum is not None):
            judge.say("CONTRACT-THRESHOLD", f"{name} has `equals` beside another bound", *here)
        if threshold.minimum is not None and threshold.maximum is not None and threshold.minimum > threshold.maximum:
            judge.say("CONTRACT-THRESHOLD", f"{name}: the minimum lies above the maximum, nothing can keep it", *here)
        if not threshold.basis.strip():
            judge.say("CONTRACT-BASIS", f"{name} has no basis: say where the number comes from", *here, "basis")
        if threshold.measure in seen:
            judge.say("CONTRACT-THRESHOLD", f"{name} is there twice", *here)
        seen.add(threshold.measure)


def _harnesses(judge: _Judge) -> None:
    for index, harness in enumerate(judge.contract.kani_harnesses):
        place = ("kani_harnesses", index)
        if not harness.obligation.strip():
            judge.say("SCHEMA-011", f"{harness.id}: the obligation is empty", *place, "obligation")
        if harness.bound is None:
            judge.say("SCHEMA-012", f"{harness.id}: there is no bound", *place, severity="warning")
    _once(judge, "kani_harnesses", "SCHEMA-010")


def _once(judge: _Judge, section: str, rule: str) -> None:
    first: dict[str, int] = {}
    for index, item in enumerate(getattr(judge.contract, section)):
        at = first.setdefault(item.id, index)
        if at != index:
            line = judge.contract.line(section, at, "id")
            judge.say(rule, f"the id {item.id} is there twice (first in line {line})", section, index, "id")


def judge_together(contracts: Sequence[Contract]) -> Iterator[Problem]:
    """What only shows among several contracts: ids that two of them claim, and cycles of `depends_on`."""
    owners: dict[str, Contract] = {}
    for contract in contracts:
        for index, test in enumerate(contract.falsification_tests):
            owner = owners.setdefault(test.id, contract)
            if owner is not contract:
                line = contract.line("falsification_tests", index, "id")
                text = f"the id {test.id} belongs to {owner.path.name}, too: an id names one test"
                yield Problem(contract.path, line, "SCHEMA-007", text)
    yield from _dependencies({contract.id: contract for contract in contracts})


def _dependencies(known: dict[str, Contract]) -> Iterator[Problem]:
    """Contracts that are named and not there, and cycles: each cycle once, at its alphabetically first contract."""
    for contract in known.values():
        for index, name in enumerate(contract.metadata.depends_on):
            if name not in known and not (contract.path.parent / f"{name}.yaml").is_file():
                text = f"depends_on names {name!r}, and there is no {name}.yaml beside this file"
                line = contract.line("metadata", "depends_on", index)
                yield Problem(contract.path, line, "CONTRACT-DEPENDS", text)
    reported: set[frozenset[str]] = set()
    for start in sorted(known):
        cycle = _cycle_from(start, known)
        if cycle and frozenset(cycle) not in reported:
            reported.add(frozenset(cycle))
            text = f"depends_on goes round: {' → '.join([*cycle, cycle[0]])}"
            yield Problem(known[start].path, known[start].line("metadata", "depends_on"), "CONTRACT-CYCLE", text)


def _cycle_from(start: str, known: dict[str, Contract]) -> list[str]:
    """A way from a contract back to itself, without recursion; empty where there is none."""
    came_from: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        for needed in known[name].metadata.depends_on:
            if needed == start:
                way = [name]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if needed in known and needed not in came_from:
                came_from[needed] = name
                waiting.append(needed)
    return []
