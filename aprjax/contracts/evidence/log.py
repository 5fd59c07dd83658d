"""The raw log of a check: a line per test, made to be read by people and parsed back to the last fact.

    aprjax check, started 2026-11-23T12:00:00+00:00
    command: python -m aprjax check contracts --model a.apr --ref b.gguf
    model: sha256 0123…, 1117320768 bytes, apr, llama.cpp arithmetic: a.apr
    ref: sha256 4567…, 1117320768 bytes, gguf, llama.cpp arithmetic: b.gguf
    PASS FALSIFY-APR-GGUF-PARITY-001 of apr-vs-gguf-forward-parity-v1 in 0.120 s: 28 of 28 ratios lie in [0.5, 2.0]
    UNMEASURED … FAIL …
    3 tests: 1 passed, 1 failed, 1 unmeasured; exit code 1; 12.345 s

Evidence takes its counts and verdicts from this text, never from the objects that it was made of, so that what a reader
finds in the log is what the evidence says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from aprjax.contracts.types import CheckReport, Status

_HEAD = re.compile(r"aprjax check, started (?P<started>\S*)")
_COMMAND = re.compile(r"command: (?P<command>.*)")
_SIDE = re.compile(
    r"(?P<name>[\w-]+): sha256 (?P<sha256>[0-9a-f]{64}|unknown), (?P<nbytes>\d+|unknown) bytes, "
    r"(?P<format>[^,]*), (?P<arithmetic>.*) arithmetic: (?P<path>.*)"
)
_TEST = re.compile(
    r"(?P<status>[A-Z]+) (?P<test_id>\S+) of (?P<contract_id>\S+) in (?P<seconds>\d+\.\d+) s: (?P<reason>.*)"
)
_SUMMARY = re.compile(
    r"(?P<tests>\d+) tests: (?P<passed>\d+) passed, (?P<failed>\d+) failed, (?P<unmeasured>\d+) unmeasured"
    r"(?: \(allowed: (?P<allowed>[^)]*)\))?; exit code (?P<exit_code>\d+); (?P<seconds>\d+\.\d+) s"
)


class LogError(ValueError):
    """A text that is no log of a check; says the line."""


@dataclass(frozen=True)
class LoggedSide:
    """A side as the log has it; None is unknown."""

    sha256: str | None
    nbytes: int | None
    format: str
    arithmetic: str
    path: str


@dataclass(frozen=True)
class LoggedTest:
    """A test's line; `status` is the word in lower case, whatever it is."""

    contract_id: str
    test_id: str
    status: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class LoggedCheck:
    """A log, parsed: its lines, and beside them what its last line claims to have counted."""

    started: str
    command: str
    sides: dict[str, LoggedSide]
    tests: tuple[LoggedTest, ...]
    claimed: dict[str, int] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    seconds: float = 0.0

    def count(self, status: str) -> int:
        """How many lines have the status."""
        return sum(test.status == status for test in self.tests)


def log_text(report: CheckReport) -> str:
    """The raw log of a report."""
    lines = [f"aprjax check, started {report.started}", f"command: {_line(report.command)}"]
    for name, side in report.sides.items():
        size = "unknown" if side.nbytes is None else side.nbytes
        lines.append(
            f"{name}: sha256 {side.sha256 or 'unknown'}, {size} bytes, {side.format}, {side.arithmetic} arithmetic: "
            f"{_line(side.path)}"
        )
    for outcome in report.outcomes:
        lines.append(
            f"{str(outcome.status).upper()} {outcome.test_id} of {outcome.contract_id} in {outcome.seconds:.3f} s: "
            f"{_line(outcome.reason)}"
        )
    counts = [report.count(status) for status in (Status.PASS, Status.FAIL, Status.UNMEASURED)]
    allowed = f" (allowed: {', '.join(report.allowed)})" if report.allowed else ""
    lines.append(
        f"{len(report.outcomes)} tests: {counts[0]} passed, {counts[1]} failed, {counts[2]} unmeasured{allowed}; "
        f"exit code {report.exit_code}; {report.seconds:.3f} s"
    )
    return "\n".join(lines) + "\n"


def parse_log(text: str) -> LoggedCheck:
    """The log, line by line.

    Raises:
        LogError: a line is none of a log's, or one of them is missing.
    """
    lines = text.splitlines()
    if len(lines) < 3:
        raise LogError(f"expected a head, a command and a summary, found {len(lines)} lines")
    head, command = _HEAD.fullmatch(lines[0]), _COMMAND.fullmatch(lines[1])
    summary = _SUMMARY.fullmatch(lines[-1])
    for number, found, what in ((1, head, "the head"), (2, command, "the command"), (len(lines), summary, "counts")):
        if found is None:
            raise LogError(f"line {number}: expected {what}, found {lines[number - 1]!r:.120}")
    assert head is not None
    assert command is not None
    assert summary is not None
    sides, tests = _body(lines[2:-1])
    counted = {key: int(summary[key]) for key in ("tests", "passed", "failed", "unmeasured", "exit_code")}
    allowed = tuple(part for part in (summary["allowed"] or "").split(", ") if part)
    return LoggedCheck(
        head["started"], command["command"], sides, tuple(tests), counted, allowed, float(summary["seconds"])
    )


def _body(lines: Iterable[str]) -> tuple[dict[str, LoggedSide], list[LoggedTest]]:
    sides: dict[str, LoggedSide] = {}
    tests: list[LoggedTest] = []
    for number, line in enumerate(lines, start=3):
        test, side = _TEST.fullmatch(line), _SIDE.fullmatch(line)
        if test is not None:
            tests.append(
                LoggedTest(
                    test["contract_id"], test["test_id"], test["status"].lower(), float(test["seconds"]), test["reason"]
                )
            )
        elif side is not None and not tests:
            sides[side["name"]] = LoggedSide(
                None if side["sha256"] == "unknown" else side["sha256"],
                None if side["nbytes"] == "unknown" else int(side["nbytes"]),
                side["format"],
                side["arithmetic"],
                side["path"],
            )
        else:
            raise LogError(f"line {number}: neither a side nor a test: {line!r:.120}")
    return sides, tests


def _line(text: str) -> str:
    """One line of it: a log has a line per fact."""
    return " ".join(text.split())
