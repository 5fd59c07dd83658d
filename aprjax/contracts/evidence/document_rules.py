"""What a discharge document must fulfil beside the log and the raw report that it stands on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from aprjax.contracts.evidence.documents import LOG, RAW, bound_checks
from aprjax.contracts.evidence.findings import Contradiction
from aprjax.contracts.evidence.lifecycle import TEST_LADDER, TEST_STATUSES
from aprjax.contracts.evidence.log import LoggedCheck, LoggedTest
from aprjax.contracts.reading import Unreadable, expect
from aprjax.contracts.types import Status

_WORDS = {"pass": "Pass", "fail": "Fail", "unmeasured": "Unmeasured"}
_LIFTED = ("FUNCTIONAL", "DISCHARGED")


def judge_document(
    name: str,
    document: Any,
    test: LoggedTest,
    *,
    folder: Path,
    log: LoggedCheck,
    raw: dict[str, Any],
    names: Sequence[str],
) -> Iterator[Contradiction]:
    """The contradictions of one document."""
    try:
        _shape(document)
        yield from _facts(name, document, test, log)
        yield from _artifacts(name, document, log)
        yield from _status(name, document, test)
        yield from _proof(name, document, test, raw)
        yield from _paths(folder, name, document, names)
    except (Unreadable, TypeError, KeyError) as error:
        yield Contradiction("wrong-type", name, str(error))


def _shape(document: Any) -> None:
    for key in ("$schema", "evidence_id", "binds_to", "falsification_id", "discharge_status", "previous_status"):
        expect(document, key, str)
    for key in ("discharge_date", "command", "raw_run_output", "raw_report", "started_utc", "written_utc", "contract"):
        expect(document, key, str)
    if not re.fullmatch(r"[0-9a-f]{64}", expect(document, "rule_sha256", str)):
        raise Unreadable("'rule_sha256' is expected as 64 lower-case hex digits")
    for key in ("host", "versions", "discharge_proof"):
        expect(document, key, dict)
    for key in ("shipped_artifact", "reference_artifact"):
        expect(document, key, dict, type(None))
    for key in ("verification_chain", "unmeasured", "raw_files", "next_actions"):
        expect(document, key, list)
    for key in ("raw_files", "unmeasured"):
        if not all(isinstance(item, str) for item in document[key]):
            raise Unreadable(f"{key!r} is expected as a list of texts")
    expect(document, "exit_code", int)
    expect(document, "wall_time_seconds", int, float)
    for step in document["verification_chain"]:
        expect(step, "step", int)
        expect(step, "verdict", str)
    for key in ("rule", "verdict"):
        expect(document["discharge_proof"], key, str)
    expect(document["discharge_proof"], "observed", dict)
    expect(document["discharge_proof"], "thresholds", list)


def _facts(name: str, document: dict[str, Any], test: LoggedTest, log: LoggedCheck) -> Iterator[Contradiction]:
    """What the log says, too."""
    told = {
        "falsification_id": test.test_id,
        "contract": test.contract_id,
        "command": log.command,
        "exit_code": log.claimed["exit_code"],
        "started_utc": log.started,
        "discharge_date": log.started[:10],
        "wall_time_seconds": log.seconds,
    }
    for key, expected in told.items():
        if document[key] != expected:
            message = f"{key} is {document[key]!r:.120}, and the log has {expected!r:.120}"
            yield Contradiction("fact-mismatch", name, message)
    for key in sorted({"hostname", "user", "username"} & set(document["host"])):
        yield Contradiction("names-a-place", name, f"host.{key}: evidence names the machine's kind, not its name")
    try:
        late = datetime.fromisoformat(document["written_utc"]) < datetime.fromisoformat(document["started_utc"])
    except (ValueError, TypeError):
        late = True
    if late:
        yield Contradiction("time-insane", name, "it was written before the check began, or the times are none")


def _artifacts(name: str, document: dict[str, Any], log: LoggedCheck) -> Iterator[Contradiction]:
    for key, side_name in (("shipped_artifact", "model"), ("reference_artifact", "ref")):
        artifact, side = document[key], log.sides.get(side_name)
        if (artifact is None) != (side is None):
            yield Contradiction(
                "artifact-differs", name, f"{key} is there without the log's {side_name}, or the reverse"
            )
        elif artifact is not None and side is not None:
            found = (artifact.get("sha256"), artifact.get("file_size_bytes"))
            if found != (side.sha256, side.nbytes):
                message = f"{key} has SHA-256 {found[0]} and {found[1]} bytes; the log has {side.sha256}, {side.nbytes}"
                yield Contradiction("artifact-differs", name, message)


def _status(name: str, document: dict[str, Any], test: LoggedTest) -> Iterator[Contradiction]:
    """Legal statuses; only a pass lifts one, and nothing lowers it."""
    before, after = document["previous_status"], document["discharge_status"]
    illegal = [status for status in (before, after) if status not in TEST_STATUSES]
    for status in illegal:
        yield Contradiction("status-unknown", name, f"{status!r:.80} is no status of a test")
    if illegal:
        return
    if TEST_LADDER.index(after) < TEST_LADDER.index(before):
        yield Contradiction("status-illegal", name, f"{before} → {after} leads back")
    if after != before and test.status != Status.PASS:
        kind = "unmeasured-as-passed" if test.status == Status.UNMEASURED else "verdict-contradicts"
        yield Contradiction(kind, name, f"the test ended {test.status}, and its status moves from {before} to {after}")
    if after != before and after not in _LIFTED:
        yield Contradiction(
            "status-illegal", name, f"a run that passes leads to {' or '.join(_LIFTED)}, not to {after}"
        )


def _proof(name: str, document: dict[str, Any], test: LoggedTest, raw: dict[str, Any]) -> Iterator[Contradiction]:
    """Verdicts are the log's, numbers and bounds the raw report's, and the chain says what they come to."""
    expected = f"{_WORDS.get(test.status, test.status)} — {test.reason}"
    proof, chain = document["discharge_proof"], document["verification_chain"]
    outcome = next(
        (o for o in raw["outcomes"] if (o["contract_id"], o["test_id"]) == (test.contract_id, test.test_id)), None
    )
    if proof["verdict"] != expected:
        yield Contradiction(
            "verdict-contradicts", name, f"the proof says {proof['verdict']!r:.120}, the log {expected!r:.120}"
        )
    if not chain or chain[0]["verdict"] != expected:
        yield Contradiction("verdict-contradicts", name, "the chain's first step does not have the log's verdict")
    if [step["step"] for step in chain] != list(range(1, len(chain) + 1)):
        yield Contradiction("chain-broken", name, "the chain's steps are not numbered 1, 2, …")
    if test.status == Status.PASS and any(not step["verdict"].startswith("Pass") for step in chain):
        yield Contradiction("verdict-contradicts", name, "the test passes, and a step of its chain does not")
    if outcome is not None:
        if proof["observed"] != outcome["measured"] or proof["thresholds"] != outcome["thresholds"]:
            message = "other numbers or bounds than in the raw report"
            yield Contradiction("fact-mismatch", name, message)
        told = [check for step in chain for check in step.get("checks", [])]
        if told != bound_checks(outcome):
            yield Contradiction("verdict-contradicts", name, "its bounds, applied again, do not come to what it says")
        if proof["rule"] != outcome["rule"] and outcome["rule"]:
            yield Contradiction("fact-mismatch", name, "another rule than in the raw report")
    if not document["unmeasured"] or (test.status == Status.UNMEASURED and document["unmeasured"] == ["none"]):
        yield Contradiction(
            "unmeasured-missing", name, "it does not say what was not measured (`none` must be written)"
        )


def _paths(folder: Path, name: str, document: dict[str, Any], names: Sequence[str]) -> Iterator[Contradiction]:
    """Files that it names are this folder's, and vouched for; a remark in parentheses behind a path is none of it."""
    prefix = f"evidence/{folder.name}/"
    wanted = {"raw_run_output": LOG, "raw_report": RAW}
    for key, path in [*((key, document[key]) for key in wanted), *(("raw_files", p) for p in document["raw_files"])]:
        bare = re.sub(r"\s*\(.*\)\s*$", "", path)
        inside = bare.removeprefix(prefix)
        if inside == bare or inside not in names or (key in wanted and inside != wanted[key]):
            yield Contradiction(
                "path-dangles", name, f"{key} names {path!r:.160}, which is no vouched-for file of this folder"
            )
