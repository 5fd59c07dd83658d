"""`discharge-evidence-v1.json` (contracts.md section 6): upstream's fields, filled from a parsed log and a raw report.

A document is about one falsification test. Paths in it are those from the repository's root, as upstream writes them.
What upstream has no field for stands beside its fields: bounds with their basis, versions, and what was not measured.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from typing import Any

from aprjax.contracts.evidence.lifecycle import earned, status_of
from aprjax.contracts.evidence.log import LoggedCheck, LoggedTest
from aprjax.contracts.types import Contract, FalsificationTest, Status, Threshold

DOCUMENT = "discharge-evidence-v1.json"
LOG = "check.log"
RAW = "check.json"
_WORDS = {Status.PASS: "Pass", Status.FAIL: "Fail", Status.UNMEASURED: "Unmeasured"}


def rule_digest(test: FalsificationTest) -> str:
    """The SHA-256 of what a test demands: evidence of another demand is evidence of something else.

    Statuses and evidence are left out: they change when the evidence is accepted.
    """
    demand = {
        "id": test.id,
        "rule": test.rule,
        "prediction": test.prediction,
        "test": test.test,
        "thresholds": [asdict(threshold) for threshold in test.thresholds],
    }
    return hashlib.sha256(json.dumps(demand, sort_keys=True).encode()).hexdigest()


def folder_of(contract_id: str, test_id: str) -> str:
    """Where a test's document lies in its evidence folder; ids may hold what names of folders may not."""
    return "/".join(re.sub(r"[^\w.-]", "-", name.lower()) for name in (contract_id, test_id))


def threshold_of(document: dict[str, Any]) -> Threshold:
    """A bound from its JSON.

    Raises:
        TypeError, KeyError: it is none.
    """
    keys = ("measure", "basis", "minimum", "maximum", "equals", "unit")
    return Threshold(**{key: document[key] for key in keys if key in document})


def bound_checks(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bound of an outcome applied to what was measured, once more."""
    measured = outcome["measured"]
    checks = []
    for document in outcome["thresholds"]:
        threshold = threshold_of(document)
        value = measured.get(threshold.measure)
        checks.append(
            {
                "measure": threshold.measure,
                "value": value,
                "bound": str(threshold),
                "holds": None if value is None else threshold.holds(value),
                "basis": threshold.basis,
            }
        )
    return checks


def discharge_document(
    contract: Contract,
    test: FalsificationTest,
    logged: LoggedTest,
    log: LoggedCheck,
    raw: dict[str, Any],
    *,
    folder: str,
    host: dict[str, Any],
    versions: dict[str, Any],
    finished: str,
) -> dict[str, Any]:
    """The document of one test.

    Args:
        contract: that the test is of.
        test: as the contract has it.
        logged: its line of the log.
        log: the whole log.
        raw: the raw report, `aprjax.check/1`.
        folder: name of the evidence folder.
        host: see `facts.host_facts`.
        versions: see `facts.version_facts`.
        finished: when the evidence was written, UTC, ISO 8601.
    """
    outcome = next(o for o in raw["outcomes"] if (o["contract_id"], o["test_id"]) == (contract.id, test.id))
    status = Status(logged.status)
    verdict = f"{_WORDS[status]} — {logged.reason}"
    checks = bound_checks(outcome)
    here = f"evidence/{folder}"
    return {
        "$schema": f"../../../../contracts/{contract.path.name}#{test.id}.discharged_evidence",
        "evidence_id": f"{test.id}-DISCHARGED-EVIDENCE-V1",
        "binds_to": test.binds_to or contract.id,
        "contract": contract.id,
        "contract_version": contract.metadata.version,
        "falsification_id": test.id,
        "rule_sha256": rule_digest(test),
        "discharge_status": earned(test, logged.status),
        "previous_status": status_of(test),
        "discharge_date": log.started[:10],
        "discharge_session": "written by `aprjax check --evidence`; every fact is parsed from the raw files below",
        "host": host,
        "versions": versions,
        "shipped_artifact": _artifact(log, "model", raw),
        "reference_artifact": _artifact(log, "ref", raw),
        "command": log.command,
        "test_command": outcome["command"],
        "exit_code": log.claimed["exit_code"],
        "started_utc": log.started,
        "written_utc": finished,
        "wall_time_seconds": log.seconds,
        "test_wall_time_seconds": logged.seconds,
        "raw_run_output": f"{here}/{LOG}",
        "raw_report": f"{here}/{RAW}",
        "raw_files": [f"{here}/raw/{name}" for name in outcome["artifacts"]],
        "verification_chain": [
            {
                "step": 1,
                "purpose": "The test ran, and what became of it, by the raw log",
                "test": test.test or test.name or test.test_harness,
                "verdict": verdict,
            },
            {
                "step": 2,
                "purpose": "Every bound, applied to what was measured",
                "checks": checks,
                "verdict": _bounds_verdict(checks),
            },
        ],
        "discharge_proof": {
            "rule": test.rule,
            "prediction": test.prediction,
            "observed": outcome["measured"],
            "thresholds": outcome["thresholds"],
            "verdict": verdict,
            "ship_blocking": bool(test.ship_blocking),
            "evidence_strength": f"run on {raw['sides']['model']['arithmetic']} arithmetic"
            if "model" in raw["sides"]
            else "run without a model",
        },
        "unmeasured": _unmeasured(test, logged, outcome),
        "next_actions": [] if status is Status.PASS else [test.if_fails],
    }


def _artifact(log: LoggedCheck, name: str, raw: dict[str, Any]) -> dict[str, Any] | None:
    """A side in upstream's words; its path is the file's name, since folders are nobody else's business."""
    side = log.sides.get(name)
    if side is None:
        return None
    told = raw["sides"][name]
    return {
        "canonical_path": re.split(r"[/\\]", side.path)[-1],
        "format": side.format.upper(),
        "file_size_bytes": side.nbytes,
        "sha256": side.sha256,
        "arithmetic": side.arithmetic,
        "architecture": told["architecture"],
        "tensor_count": told["tensors"],
    }


def _bounds_verdict(checks: list[dict[str, Any]]) -> str:
    if not checks:
        return "Pass — the rule has no number to bound"
    unknown = [check["measure"] for check in checks if check["holds"] is None]
    broken = [check["bound"] for check in checks if check["holds"] is False]
    if broken:
        return f"Fail — not kept: {'; '.join(broken)}"
    if unknown:
        return f"Unmeasured — no value of {', '.join(unknown)}"
    return f"Pass — {len(checks)} of {len(checks)} bounds hold"


def _unmeasured(test: FalsificationTest, logged: LoggedTest, outcome: dict[str, Any]) -> list[str]:
    """What was not measured; `none` is a claim, and is written as one."""
    found = [f"the test: {logged.reason}"] if logged.status == Status.UNMEASURED else []
    found += [f"the number {name}" for name, value in outcome["measured"].items() if value is None]
    if test.full_discharge_blocks_on:
        found.append(f"what its full discharge waits for: {test.full_discharge_blocks_on}")
    return found or ["none"]
