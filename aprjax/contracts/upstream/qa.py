"""Reports of `apr qa` (contracts.md section 5), read without believing that what was skipped has passed.

Upstream's report says `passed: true` of a gate that it skipped (#3965). Here a gate has one of three states, and so has
the whole report. Written as upstream's, a skipped gate keeps their `passed: true`, since their reader wants it, and
carries its state in a key of its own, which their reader leaves alone.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.facts import host_facts
from aprjax.contracts.reading import Unreadable, expect, read_document
from aprjax.contracts.types import CheckReport, Status, TestOutcome
from aprjax.trace.serde import serde_pretty

# Upstream's gates, in the order of its reports.
GATES = (
    "capability_match",
    "tensor_contract",
    "metadata_plausibility",
    "classifier_head",
    "golden_output",
    "throughput",
    "ollama_parity",
    "gpu_speedup",
    "format_parity",
    "ptx_parity",
    "gpu_state_isolation",
    "performance_regression",
)
# Which of our contracts' tests measure what a gate of upstream's does.
OUR_GATES: dict[str, tuple[str, ...]] = {
    "tensor_contract": ("APRJAX-FORMAT-004",),
    "metadata_plausibility": ("APRJAX-QA-METADATA",),
    "golden_output": ("APRJAX-GOLDEN-001",),
    "format_parity": ("APRJAX-QA-FORMAT",),
}
_SKIPPED = "Skipped: "
# Upstream's exit code of a report that did not pass.
FAILED_EXIT = 5


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        name: upstream's.
        state: pass, fail or unmeasured.
        message: what it found, or why it was not measured.
        value: what was measured, where it is a number.
        threshold: what it was held to.
        duration_ms: how long it took.
    """

    name: str
    state: Status
    message: str
    value: float | None = None
    threshold: float | None = None
    duration_ms: int = 0

    def to_apr(self, *, state: bool = True) -> dict[str, Any]:
        """The gate as upstream writes it; absent numbers have no key."""
        skipped = self.state is Status.UNMEASURED
        message = self.message
        if skipped and not message.startswith(_SKIPPED):
            message = _SKIPPED + message
        numbers = {"value": self.value, "threshold": self.threshold}
        return {
            "name": self.name,
            "passed": self.state is not Status.FAIL,
            "message": message,
            **{key: float(number) for key, number in numbers.items() if number is not None},
            "duration_ms": self.duration_ms,
            "skipped": skipped,
            **({"state": str(self.state)} if state else {}),
        }


@dataclass(frozen=True)
class QaReport:
    """A report of gates.

    Attributes:
        model: the file's name.
        gates: in upstream's order.
        timestamp: when it was made, RFC 3339.
        total_duration_ms: of all gates.
        system: upstream's `system_info`: `cpu_model`, and where there is one `gpu_model`, `gpu_driver`.
        min_executed: how many gates must have run for the report to pass.
        told: upstream's own `passed` and `summary`, of a report that was read; empty of one that was made here.
    """

    model: str
    gates: tuple[Gate, ...]
    timestamp: str
    total_duration_ms: int = 0
    system: Mapping[str, str] | None = None
    min_executed: int | None = None
    told: Mapping[str, Any] = field(default_factory=dict)

    def count(self, state: Status) -> int:
        """How many gates are in a state."""
        return sum(gate.state is state for gate in self.gates)

    @property
    def executed(self) -> int:
        """How many gates ran."""
        return len(self.gates) - self.count(Status.UNMEASURED)

    @property
    def verdict(self) -> Status:
        """Fail with a failed gate; unmeasured with a skipped one, or too few that ran; pass otherwise."""
        if self.count(Status.FAIL):
            return Status.FAIL
        too_few = self.executed < max(self.min_executed or 0, 1)
        return Status.UNMEASURED if too_few or self.count(Status.UNMEASURED) else Status.PASS

    @property
    def passed(self) -> bool:
        """Upstream's verdict, by its rule: no gate failed, and as many ran as were asked for."""
        return not self.count(Status.FAIL) and self.executed >= (self.min_executed or 0)

    @property
    def summary(self) -> str:
        """Upstream's sentence."""
        if self.passed:
            return f"All QA gates passed ({self.executed} executed, {self.count(Status.UNMEASURED)} skipped)"
        failed = [gate.name for gate in self.gates if gate.state is Status.FAIL]
        if failed:
            return f"Failed gates: {', '.join(failed)}"
        return f"Insufficient gate execution: {self.executed} < {self.min_executed or 0} minimum"

    def to_json(self) -> dict[str, Any]:
        """Upstream's document with the states: what their tools read, they find; `verdict` has three values."""
        return {**self.to_apr(state=True), "verdict": str(self.verdict)}

    def to_apr(self, *, state: bool = False) -> dict[str, Any]:
        """Upstream's document, key for key and in its order."""
        document: dict[str, Any] = {
            "model": self.model,
            "passed": self.passed,
            "gates": [gate.to_apr(state=state) for gate in self.gates],
            "gates_executed": self.executed,
            "gates_skipped": self.count(Status.UNMEASURED),
            "total_duration_ms": self.total_duration_ms,
            "timestamp": self.timestamp,
            "summary": self.summary,
        }
        if self.system is not None:
            document["system_info"] = dict(self.system)
        return document

    def to_text(self) -> str:
        """Upstream's document as `apr qa --json` prints it, byte for byte, line end included."""
        return serde_pretty(self.to_apr()) + "\n"

    def to_frame(self) -> Any:
        """A row per gate as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([gate.to_apr() for gate in self.gates])

    def top(self, k: int = 10) -> list[Gate]:
        """The k gates that matter most: failures, then what was not measured, then passes."""
        order = [Status.FAIL, Status.UNMEASURED, Status.PASS]
        return sorted(self.gates, key=lambda gate: order.index(gate.state))[:k]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(g.name)}</td><td>{g.state}</td><td>{html.escape(g.message)}</td></tr>"
            for g in self.gates
        )
        return f"<p><b>{html.escape(self.model)}</b>: {self.verdict}</p><table>{rows}</table>"


def read_qa_report(path: str | Path) -> QaReport:
    """Reads a report of `apr qa --json`.

    Raises:
        CheckpointError: it is none, or contradicts itself.
    """
    try:
        document = read_document(Path(path))
        problems = report_problems(document)
    except Unreadable as error:
        raise CheckpointError(
            f"no report of apr qa: {error}", file=path, fix="write it with `apr qa … --json`"
        ) from error
    if problems:
        raise CheckpointError(f"the report contradicts itself: {problems[0]}", file=path, fix="run `apr qa` again")
    return parse_qa_report(document)


def parse_qa_report(document: Any) -> QaReport:
    """The report in a JSON value.

    Raises:
        Unreadable: it is none.
    """
    gates = []
    for item in expect(document, "gates", list):
        skipped, passed = expect(item, "skipped", bool), expect(item, "passed", bool)
        state = Status.UNMEASURED if skipped else Status.PASS if passed else Status.FAIL
        value, threshold = (expect({key: None, **item}, key, int, float, type(None)) for key in ("value", "threshold"))
        name, message = expect(item, "name", str), expect(item, "message", str)
        gates.append(Gate(name, state, message, value, threshold, expect(item, "duration_ms", int)))
    system = expect(document, "system_info", dict, type(None)) if "system_info" in document else None
    short = expect(document, "summary", str)
    asked = re.fullmatch(r"Insufficient gate execution: \d+ < (\d+) minimum", short)
    return QaReport(
        expect(document, "model", str),
        tuple(gates),
        expect(document, "timestamp", str),
        expect(document, "total_duration_ms", int),
        system,
        int(asked[1]) if asked else None,
        {"passed": expect(document, "passed", bool), "summary": short},
    )


def report_problems(document: Any) -> list[str]:
    """Where a report contradicts itself: counts, verdict, names."""
    try:
        report = parse_qa_report(document)
    except Unreadable as error:
        return [str(error)]
    return list(_problems(document, report))


def _problems(document: dict[str, Any], report: QaReport) -> Iterator[str]:
    counts = {"gates_executed": report.executed, "gates_skipped": report.count(Status.UNMEASURED)}
    for key, count in counts.items():
        # Upstream's older reports have no counts; they read as 0 there.
        if document.get(key, count) != count:
            yield f"{key} is {document[key]!r:.40}, and the gates come to {count}"
    if report.told["passed"] != report.passed:
        yield f"passed is {report.told['passed']}, and the gates come to {report.passed}"
    if report.told["summary"] != report.summary:
        yield f"the summary is {report.told['summary']!r:.120}, and the gates come to {report.summary!r}"
    names = [gate.name for gate in report.gates]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"the gate {name} is there twice"
    for item, gate in zip(document["gates"], report.gates, strict=True):
        if item.get("state", str(gate.state)) != gate.state:
            yield f"{gate.name} has the state {item['state']!r:.40}, and its flags say {gate.state}"


def qa_report(
    model: str, outcomes: Mapping[str, Gate], *, min_executed: int | None = None, reason: str = "Not run by aprjax"
) -> QaReport:
    """A report with all of upstream's gates: those that were not run are unmeasured, with the reason."""
    gates = tuple(outcomes.get(name, Gate(name, Status.UNMEASURED, reason)) for name in GATES)
    return QaReport(
        model,
        gates,
        datetime.now(UTC).isoformat(),
        sum(gate.duration_ms for gate in gates),
        {"cpu_model": host_facts()["cpu"]},
        min_executed,
    )


def qa_report_of(
    report: CheckReport, gates: Mapping[str, Sequence[str]] = OUR_GATES, *, min_executed: int | None = None
) -> QaReport:
    """A check's outcomes as upstream's gates; see `gates_of`."""
    side = report.sides.get("model")
    found = gates_of(report.outcomes, gates)
    return qa_report(Path(side.path).name if side is not None else "", found, min_executed=min_executed)


def gates_of(outcomes: Iterable[TestOutcome], gates: Mapping[str, Sequence[str]] = OUR_GATES) -> dict[str, Gate]:
    """Outcomes of tests as gates.

    Args:
        outcomes: what became of tests.
        gates: for each gate, the ids of the tests that make it up; a gate fails with any of them, is unmeasured with
            any that is not measured or was not asked for, and passes otherwise.
    """
    by_id = {outcome.test_id: outcome for outcome in outcomes}
    found = {}
    for name, wanted in gates.items():
        ran = [by_id[test_id] for test_id in wanted if test_id in by_id]
        states = [Status(outcome.status) for outcome in ran]
        spent = round(1000 * sum(outcome.seconds for outcome in ran))
        decisive = next((o for o, state in zip(ran, states, strict=True) if state is Status.FAIL), None)
        if decisive is None and (len(ran) < len(wanted) or Status.UNMEASURED in states or not ran):
            reasons = (o.reason for o, state in zip(ran, states, strict=True) if state is Status.UNMEASURED)
            found[name] = Gate(name, Status.UNMEASURED, next(reasons, "not among the checked tests"), duration_ms=spent)
            continue
        state = Status.PASS if decisive is None else Status.FAIL
        message = decisive.reason if decisive is not None else "; ".join(outcome.reason for outcome in ran)
        found[name] = Gate(name, state, message, float(states.count(Status.PASS)), float(len(ran)), spent)
    return found
