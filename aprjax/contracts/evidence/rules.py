"""What a check's evidence must fulfil: log, raw report and documents agree, and verdicts follow from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aprjax.contracts.evidence.document_rules import judge_document
from aprjax.contracts.evidence.documents import DOCUMENT, LOG, RAW, bound_checks, folder_of
from aprjax.contracts.evidence.findings import Contradiction
from aprjax.contracts.evidence.foreign_rules import known_models
from aprjax.contracts.evidence.log import LogError, LoggedCheck, parse_log
from aprjax.contracts.evidence.receipts import FOLDER as RECEIPTS
from aprjax.contracts.evidence.receipts import QA_OUTPUT, qa_gates, receipt_name, rows_of_margins
from aprjax.contracts.reading import Unreadable, expect, read_text
from aprjax.contracts.types import NOT_ABOUT, SCHEMA, Status
from aprjax.contracts.upstream.qa import parse_qa_report

_STATUSES = frozenset(map(str, Status))
_COUNTED = {"passed": Status.PASS, "failed": Status.FAIL, "unmeasured": Status.UNMEASURED}
# The first contract of upstream's that is checked here is of 2026; clocks differ by less than a day.
_EARLIEST, _AHEAD = datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=1)
# Seconds are written with three digits.
_ROUNDING = 0.0005


def judge_check(
    folder: Path, names: Sequence[str], documents: Mapping[str, Any]
) -> tuple[dict[str, int], list[Contradiction]]:
    """The contradictions of a check's folder, and its counts by status, taken from the log's lines."""
    wrong = [
        Contradiction("file-missing", name, "a check's evidence has it, and it is not among the vouched-for files")
        for name in (LOG, RAW)
        if name not in names
    ]
    if wrong or RAW not in documents:
        return {}, wrong
    try:
        log = parse_log(read_text(folder / LOG))
    except (LogError, Unreadable) as error:
        return {}, [Contradiction("log-unreadable", LOG, str(error))]
    raw = documents[RAW]
    try:
        _shape(raw)
        wrong += [*_against_log(raw, log), *_verdicts(raw), *_times(log), *_sides(raw, log), *_gates(documents, raw)]
    except (Unreadable, TypeError, KeyError) as error:
        return {}, [*wrong, Contradiction("wrong-type", RAW, str(error))]
    wrong += _documents(folder, names, documents, log, raw)
    wrong += _receipts(names, documents)
    wrong += [
        Contradiction("raw-missing", RAW, f"{test['test_id']} rests on raw/{name}, which is not there")
        for test in raw["outcomes"]
        for name in test["artifacts"]
        if f"raw/{name}" not in names
    ]
    return {str(status): log.count(status) for status in Status}, wrong


def _shape(raw: Any) -> None:
    """Raises Unreadable where the raw report has not the types of `aprjax.check/1`."""
    if expect(raw, "schema", str) != SCHEMA:
        raise Unreadable(f"expected the schema {SCHEMA}, found {raw['schema']!r:.80}")
    for key in (*_COUNTED, "exit_code"):
        expect(raw, key, int)
    expect(raw, "command", str)
    expect(raw, "started", str)
    expect(raw, "seconds", int, float)
    for name, side in expect(raw, "sides", dict).items():
        if not isinstance(name, str):
            raise Unreadable("sides are expected by name")
        expect(side, "path", str)
        expect(side, "sha256", str, type(None))
        expect(side, "nbytes", int, type(None))
    for outcome in expect(raw, "outcomes", list):
        for key in ("contract_id", "test_id", "status", "reason", "rule", "command"):
            expect(outcome, key, str)
        expect(outcome, "seconds", int, float)
        for value in expect(outcome, "measured", dict).values():
            if not isinstance(value, float | int | str | bool | None):
                raise Unreadable(f"{outcome['test_id']} has a measured value that is no number, text or null")
        for threshold in expect(outcome, "thresholds", list):
            expect(threshold, "measure", str)
            expect(threshold, "basis", str)
            for bound in ("minimum", "maximum"):
                expect({"": None, **threshold, bound: threshold.get(bound)}, bound, int, float, type(None))
        if not all(isinstance(name, str) for name in expect(outcome, "artifacts", list)):
            raise Unreadable(f"{outcome['test_id']} has artifacts that are no names")


def _against_log(raw: dict[str, Any], log: LoggedCheck) -> Iterator[Contradiction]:
    """The report's counts, outcomes, command and times are the log's."""
    for key, status in _COUNTED.items():
        lines, claimed = log.count(status), log.claimed[key]
        if claimed != lines:
            message = f"the summary claims {claimed} {key}, and {lines} lines say {str(status).upper()}"
            yield Contradiction("count-mismatch", LOG, message)
        if raw[key] != lines:
            yield Contradiction("count-mismatch", RAW, f"{key} is {raw[key]}, and the log has {lines}")
    if log.claimed["tests"] != len(log.tests):
        message = f"the summary claims {log.claimed['tests']} tests, and there are {len(log.tests)} lines"
        yield Contradiction("count-mismatch", LOG, message)
    logged = [(t.contract_id, t.test_id) for t in log.tests]
    listed = [(o["contract_id"], o["test_id"]) for o in raw["outcomes"]]
    for key in sorted({key for key in logged if logged.count(key) > 1}):
        yield Contradiction("listed-twice", LOG, f"{key[1]} of {key[0]} has two lines")
    for key in sorted(set(logged) ^ set(listed)):
        where, other = (LOG, RAW) if key in logged else (RAW, LOG)
        yield Contradiction("outcome-mismatch", where, f"{key[1]} of {key[0]} is here, and not in {other}")
    by_key = {(o["contract_id"], o["test_id"]): o for o in raw["outcomes"]}
    for test in log.tests:
        outcome = by_key.get((test.contract_id, test.test_id))
        if test.status not in _STATUSES:
            yield Contradiction("status-unknown", LOG, f"{test.test_id} has the status {test.status!r:.60}")
        if outcome is None:
            continue
        if outcome["status"] != test.status:
            message = f"{test.test_id} is {outcome['status']!r:.60}, and {test.status!r:.60} in the log"
            yield Contradiction("outcome-mismatch", RAW, message)
        if " ".join(outcome["reason"].split()) != test.reason:
            yield Contradiction("reason-mismatch", RAW, f"{test.test_id} has another reason than in the log")
        if abs(outcome["seconds"] - test.seconds) > _ROUNDING:
            yield Contradiction("time-mismatch", RAW, f"{test.test_id} took other seconds than in the log")
    for key, told in (("command", log.command), ("started", log.started), ("exit_code", log.claimed["exit_code"])):
        said = " ".join(raw[key].split()) if key == "command" else raw[key]
        if said != told:
            yield Contradiction("outcome-mismatch", RAW, f"{key} is {raw[key]!r:.120}, and {told!r:.120} in the log")
    allowed = tuple(raw.get("allowed_unmeasured", ()))
    if allowed != log.allowed:
        yield Contradiction("outcome-mismatch", RAW, "other tests are allowed to be unmeasured than in the log")


def _verdicts(raw: dict[str, Any]) -> Iterator[Contradiction]:
    """Each status is legal and follows from bounds and numbers, and the exit code from the statuses."""
    statuses = [outcome["status"] for outcome in raw["outcomes"]]
    for outcome in raw["outcomes"]:
        name, status = outcome["test_id"], outcome["status"]
        if status not in _STATUSES:
            yield Contradiction("status-unknown", RAW, f"{name} has the status {status!r:.60}")
            continue
        if not outcome["reason"].strip():
            yield Contradiction("reason-missing", RAW, f"{name} gives no reason")
        checks = bound_checks(outcome)
        broken = [check["bound"] for check in checks if check["holds"] is False]
        unknown = [check["measure"] for check in checks if check["holds"] is None]
        if status == Status.PASS and broken:
            yield Contradiction("verdict-contradicts", RAW, f"{name} passes, and does not keep {'; '.join(broken)}")
        if status == Status.PASS and unknown:
            message = f"{name} passes, and {', '.join(unknown)} was not measured"
            yield Contradiction("unmeasured-as-passed", RAW, message)
        if status == Status.FAIL and checks and not broken and not unknown:
            yield Contradiction("verdict-contradicts", RAW, f"{name} fails, and keeps every bound")
        for check in checks:
            if not check["basis"].strip():
                yield Contradiction("basis-missing", RAW, f"{name} has the bound {check['bound']} without a basis")
    inapplicable = set(raw.get("not_applicable", ()))
    for outcome in raw["outcomes"]:
        told = outcome["status"] == Status.UNMEASURED and outcome["reason"].startswith(NOT_ABOUT)
        if (outcome["test_id"] in inapplicable) != told:
            message = f"{outcome['test_id']} is called not applicable in one place and not in the other"
            yield Contradiction("verdict-contradicts", RAW, message)
    allowed = {*raw.get("allowed_unmeasured", ()), *inapplicable}
    missing = [o for o in raw["outcomes"] if o["status"] == Status.UNMEASURED and o["test_id"] not in allowed]
    expected = 1 if Status.FAIL in statuses else 3 if missing or Status.PASS not in statuses else 0
    if raw["exit_code"] != expected:
        message = f"the outcomes make exit code {expected}, and {raw['exit_code']} is told"
        yield Contradiction("verdict-contradicts", RAW, message)


def _times(log: LoggedCheck) -> Iterator[Contradiction]:
    """The check began at a real time, and its tests took no longer than it."""
    try:
        started = datetime.fromisoformat(log.started)
    except ValueError:
        yield Contradiction("time-insane", LOG, f"{log.started!r:.60} is no time in ISO 8601")
        return
    if started.tzinfo is None or not _EARLIEST <= started <= datetime.now(UTC) + _AHEAD:
        yield Contradiction("time-insane", LOG, f"it began at {log.started}, which has no zone or cannot be")
    spent = sum(test.seconds for test in log.tests)
    if spent > log.seconds + _ROUNDING * (len(log.tests) + 1):
        message = f"its tests took {spent:.3f} s, and all of it {log.seconds:.3f} s"
        yield Contradiction("time-insane", LOG, message)


def _sides(raw: dict[str, Any], log: LoggedCheck) -> Iterator[Contradiction]:
    """Both say the same of each side, and an official file has its official SHA-256."""
    if set(raw["sides"]) != set(log.sides):
        yield Contradiction(
            "artifact-differs", RAW, f"sides are {sorted(raw['sides'])}, the log has {sorted(log.sides)}"
        )
    known = known_models()
    for name, side in raw["sides"].items():
        logged = log.sides.get(name)
        if logged is not None and (side["sha256"], side["nbytes"]) != (logged.sha256, logged.nbytes):
            message = f"{name} has SHA-256 {side['sha256']} and {side['nbytes']} bytes, and others in the log"
            yield Contradiction("artifact-differs", RAW, message)
        expected = known.get(Path(side["path"]).name)
        if expected is not None and side["sha256"] not in (None, expected):
            message = (
                f"{Path(side['path']).name} is said to have SHA-256 {side['sha256']}; the official file has {expected}"
            )
            yield Contradiction("artifact-differs", RAW, message)


def _documents(
    folder: Path, names: Sequence[str], documents: Mapping[str, Any], log: LoggedCheck, raw: dict[str, Any]
) -> Iterator[Contradiction]:
    """A document for every line of the log, and none beside them."""
    expected = {f"{folder_of(test.contract_id, test.test_id)}/{DOCUMENT}": test for test in log.tests}
    for name, test in expected.items():
        if name not in names:
            yield Contradiction("file-missing", name, f"{test.test_id} is in the log and has no document")
        elif name in documents:
            yield from judge_document(name, documents[name], test, folder=folder, log=log, raw=raw, names=names)
    for name in names:
        if name.endswith(f"/{DOCUMENT}") and name not in expected:
            yield Contradiction("outcome-mismatch", name, "a document of a test that the log does not have")


def _receipts(names: Sequence[str], documents: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Each receipt's rows, made again from the raw report that it names, are its rows."""
    sources = {receipt_name(name.removeprefix("raw/")): name for name in names if name.startswith("raw/")}
    for name in names:
        if not name.startswith(f"{RECEIPTS}/") or name not in documents:
            continue
        source = sources.get(name)
        try:
            rows = rows_of_margins(documents[source]) if source is not None and source in documents else None
        except (KeyError, TypeError):
            rows = None
        if rows is None:
            yield Contradiction("raw-missing", name, "no raw report of logits lies behind it")
        elif documents[name].get("raw", {}).get("metrics") != rows:
            yield Contradiction("fact-mismatch", name, f"its rows are not those of {source}")


def _gates(documents: Mapping[str, Any], raw: dict[str, Any]) -> Iterator[Contradiction]:
    """The gates of `apr qa`, made again from the raw report, are those of its document."""
    try:
        gates = qa_gates(raw)
    except ValueError:
        return  # an unknown status, which is said elsewhere
    told = documents.get(QA_OUTPUT)
    if (told is None) != (gates is None):
        yield Contradiction("file-missing", QA_OUTPUT, "gates without their tests, or tests without their gates")
    elif gates is not None:
        told_gates = {gate.name: gate for gate in parse_qa_report(told).gates}
        for name, gate in gates.items():
            found = told_gates.get(name)
            if found is None or found.to_apr() != gate.to_apr():
                message = f"{name} is not what its tests came to: {gate.state}, {gate.message!r:.100}"
                yield Contradiction("verdict-contradicts", QA_OUTPUT, message)
        for name in sorted(set(told_gates) - set(gates)):
            if told_gates[name].state is not Status.UNMEASURED:
                yield Contradiction("unmeasured-as-passed", QA_OUTPUT, f"{name} was not run, and is not called skipped")
