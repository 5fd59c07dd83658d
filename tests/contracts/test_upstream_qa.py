"""Reports of `apr qa` and upstream's discharge documents: its bytes, and its defects; skipped is never passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contracts_checked import report

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence import validate_folder, write_evidence
from aprjax.contracts.evidence.manifest import seal
from aprjax.contracts.types import Status
from aprjax.contracts.upstream.qa import (
    GATES,
    Gate,
    parse_qa_report,
    qa_report,
    qa_report_of,
    read_qa_report,
    report_problems,
)

# The form of the report that upstream's SHIP-006 rests on (contracts.md 3 and 5): 12 gates, 6 executed, 6 skipped.
APR_QA = """\
{
  "model": "teacher.apr",
  "passed": true,
  "gates": [
    {
      "name": "tensor_contract",
      "passed": true,
      "message": "339 tensors pass — all gates",
      "value": 339.0,
      "threshold": 0.0,
      "duration_ms": 36710,
      "skipped": false
    },
    {
      "name": "throughput",
      "passed": true,
      "message": "9.2 tok/s >= 1 tok/s threshold",
      "value": 9.244493748411102,
      "threshold": 1.0,
      "duration_ms": 67313,
      "skipped": false
    },
    {
      "name": "ptx_parity",
      "passed": true,
      "message": "Skipped: Non-GGUF format",
      "duration_ms": 0,
      "skipped": true
    }
  ],
  "gates_executed": 2,
  "gates_skipped": 1,
  "total_duration_ms": 104023,
  "timestamp": "2026-05-10T21:00:57.954173607+00:00",
  "summary": "All QA gates passed (2 executed, 1 skipped)",
  "system_info": {
    "cpu_model": "a processor",
    "gpu_model": "a GPU",
    "gpu_driver": "570.207"
  }
}
"""


def document() -> dict[str, Any]:
    return json.loads(APR_QA)


def test_a_report_comes_back_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(APR_QA, encoding="utf-8")
    found = read_qa_report(tmp_path / "qa.json")
    assert found.to_text() == APR_QA


def test_a_skipped_gate_is_not_passed() -> None:
    found = parse_qa_report(document())
    assert [gate.state for gate in found.gates] == [Status.PASS, Status.PASS, Status.UNMEASURED]
    assert found.verdict is Status.UNMEASURED
    # Upstream's own word for the same report; both are there, and neither hides the other.
    assert found.passed is True
    told = found.to_json()
    assert (told["passed"], told["verdict"]) == (True, "unmeasured")
    assert [gate["state"] for gate in told["gates"]] == ["pass", "pass", "unmeasured"]
    # What carries states is still a report to upstream's reader, and to ours.
    assert parse_qa_report(told) == found


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "is 6, and the gates come to 2": lambda d: d.update(gates_executed=6),
    "is 0, and the gates come to 1": lambda d: d.update(gates_skipped=0),
    "passed is False": lambda d: d.update(passed=False),
    "the summary is": lambda d: d.update(summary="All QA gates passed (3 executed, 0 skipped)"),
    "ptx_parity is there twice": lambda d: d["gates"].append(d["gates"][-1]),
    "has the state 'pass'": lambda d: d["gates"][2].update(state="pass"),
    "'skipped' is expected as bool, found str": lambda d: d["gates"][0].update(skipped="no"),
    "'duration_ms' is missing": lambda d: d["gates"][0].pop("duration_ms"),
    "'gates' is expected as list": lambda d: d.update(gates={}),
    "expected an object with 'skipped', found str": lambda d: d.update(gates=["x"]),
}


@pytest.mark.parametrize(("message", "plant"), CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_a_report_that_contradicts_itself(message: str, plant: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    changed = document()
    plant(changed)
    assert any(message in problem for problem in report_problems(changed)), report_problems(changed)
    (tmp_path / "qa.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"apr qa|contradicts itself"):
        read_qa_report(tmp_path / "qa.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gates": NaN}', "\xff"])
def test_a_file_that_is_no_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_qa_report(tmp_path / "qa.json")
    with pytest.raises(CheckpointError):
        read_qa_report(tmp_path / "none.json")


def test_summaries_are_upstreams() -> None:
    failed = Gate("golden_output", Status.FAIL, "gibberish")
    ran = Gate("throughput", Status.PASS, "fast", 120.0, 100.0, 5)
    assert qa_report("m", {"golden_output": failed, "throughput": ran}).summary == "Failed gates: golden_output"
    few = qa_report("m", {"throughput": ran}, min_executed=3)
    assert few.summary == "Insufficient gate execution: 1 < 3 minimum"
    assert (few.passed, few.verdict) == (False, Status.UNMEASURED)
    assert parse_qa_report(json.loads(few.to_text())).min_executed == 3
    assert report_problems(json.loads(few.to_text())) == []
    assert [gate.name for gate in few.gates] == list(GATES)
    everything = qa_report("m", {name: replace(ran, name=name) for name in GATES})
    assert (everything.passed, everything.verdict) == (True, Status.PASS)


def test_a_checks_outcomes_as_gates(tmp_path: Path) -> None:
    gates = {"tensor_contract": ["FALSIFY-TINY-001"], "format_parity": ["FALSIFY-TINY-001", "FALSIFY-TINY-002"]}
    states = {}
    for second in Status:
        found = qa_report_of(report(tmp_path, second=second), gates)
        states[second] = {gate.name: gate.state for gate in found.gates}
        assert report_problems(json.loads(found.to_text())) == []
        assert found.model == "a.apr"
    assert [states[s]["tensor_contract"] for s in Status] == [Status.PASS] * 3
    assert [states[s]["format_parity"] for s in Status] == list(Status)
    assert states[Status.PASS]["throughput"] is Status.UNMEASURED
    unasked = qa_report_of(report(tmp_path), {"golden_output": ["FALSIFY-ELSEWHERE-001"]})
    assert unasked.verdict is Status.UNMEASURED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "x.yaml").write_text("", encoding="ascii")
    (tmp_path / "evidence" / "x").mkdir(parents=True)
    return tmp_path / "evidence" / "x"


# Upstream's discharge documents: the form of SHIP-006's and SHIP-002's, small, with each of their defects planted.
def ship_006(folder: Path, **changes: Any) -> Path:
    raw = {"apr-qa-output.json": APR_QA}
    told = {
        "evidence_id": "FALSIFY-QA-SHIP-006-DISCHARGED-EVIDENCE-V1",
        "binds_to": "AC-SHIP1-006",
        "falsification_id": "FALSIFY-QA-SHIP-006",
        "discharge_status": "DISCHARGED",
        "previous_status": "PARTIAL_ALGORITHM_LEVEL (held on a blocker)",
        "command": "apr qa teacher.apr --json",
        "shipped_artifact": {"canonical_path": "teacher.apr", "sha256": "ab" * 32},
        "raw_qa_output": "evidence/ship-006-discharge/apr-qa-output.json (raw)",
        "qa_gates_summary": {"total_gates": 3, "executed": 2, "skipped": 1},
        "gates_executed": [
            {"name": "tensor_contract"},
            {"name": "throughput", "message": "9.2 tok/s >= 1 tok/s threshold"},
        ],
        "gates_skipped": [{"name": "ptx_parity"}],
        "verification_chain": [{"step": 1, "purpose": "run", "verdict": "Pass — done"}],
        "discharge_proof": {"observed_passed_gates": 2},
    }
    (folder / "apr-qa-output.json").write_text(raw["apr-qa-output.json"], encoding="utf-8")
    (folder / "discharge-evidence-v1.json").write_text(json.dumps(told | changes), encoding="utf-8")
    seal(folder)
    return folder


UPSTREAM: dict[str, tuple[dict[str, Any], str]] = {
    "skipped gates counted as passed": ({"discharge_proof": {"observed_passed_gates": 3}}, "unmeasured-as-passed"),
    "a gate left out": ({"gates_executed": [{"name": "tensor_contract"}]}, "count-mismatch"),
    "another count": ({"qa_gates_summary": {"executed": 3}}, "count-mismatch"),
    "another number in a message": (
        {"gates_executed": [{"name": "tensor_contract"}, {"name": "throughput", "message": "9.3 tok/s"}]},
        "fact-mismatch",
    ),
    "an error that no log has": (
        {"verification_chain": [{"step": 3, "evidence": "CUDA_ERROR_ILLEGAL_ADDRESS — transient", "verdict": "Pass"}]},
        "not-in-raw",
    ),
    "a status of its own": ({"discharge_status": "LIVE-DISCHARGED"}, "status-unknown"),
    "a raw file that is not there": ({"raw_run_output": "evidence/x/apr-run-output.txt"}, "path-dangles"),
    "a step that fails": ({"verification_chain": [{"step": 1, "verdict": "Fail — no"}]}, "verdict-contradicts"),
    "a digest that is none": ({"shipped_artifact": {"sha256": "a394"}}, "wrong-type"),
    "a chain of another type": ({"verification_chain": "Pass"}, "wrong-type"),
}


def test_upstreams_form_is_accepted(folder: Path) -> None:
    assert validate_folder(ship_006(folder)).contradictions == ()


@pytest.mark.parametrize(("changes", "expected"), UPSTREAM.values(), ids=UPSTREAM)
def test_upstreams_defects_are_found(folder: Path, changes: dict[str, Any], expected: str) -> None:
    found = validate_folder(ship_006(folder, **changes))
    assert expected in {contradiction.id for contradiction in found.contradictions}, found.contradictions


def test_parsed_python_is_parsed_again(folder: Path) -> None:
    from aprjax.text.python_completion import check_python

    code = "def fib(n):\n    return n\n"
    result = check_python(code).to_json()
    (folder / "fib-completion.py").write_text(code, encoding="utf-8")
    (folder / "ast-parse-result.json").write_text(json.dumps(result), encoding="utf-8")
    seal(folder)
    assert validate_folder(folder).accepted
    (folder / "ast-parse-result.json").write_text(json.dumps(result | {"ast_node_count": 68}), encoding="utf-8")
    seal(folder)
    assert {c.id for c in validate_folder(folder).contradictions} == {"count-mismatch"}
    (folder / "fib-completion.py").unlink()
    seal(folder)
    assert {c.id for c in validate_folder(folder).contradictions} == {"raw-missing"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["gates"][4].update(message="all golden"), "verdict-contradicts"),
        (lambda d: d["gates"][5].update(skipped=False, state="pass"), "unmeasured-as-passed"),
    ],
    ids=["another message", "a gate that was not run"],
)
def test_a_checks_gates_are_its_tests(tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    found = report(tmp_path)
    golden = replace(found.outcomes[0], test_id="APRJAX-GOLDEN-001", thresholds=(), measured={})
    tests = found.contracts[0].falsification_tests
    contract = replace(found.contracts[0], falsification_tests=(replace(tests[0], id="APRJAX-GOLDEN-001"), tests[1]))
    folder = write_evidence(
        replace(found, outcomes=(golden, found.outcomes[1]), contracts=(contract,)), tmp_path / "evidence"
    )
    assert validate_folder(folder).contradictions == ()
    path = folder / "apr-qa-output.json"
    gates = read_qa_report(path)
    assert (gates.verdict, gates.executed) == (Status.UNMEASURED, 1)
    assert [gate.name for gate in gates.gates] == list(GATES)
    told = json.loads(path.read_text(encoding="utf-8"))
    change(told)
    path.write_text(json.dumps(told), encoding="utf-8")
    seal(folder)
    assert expected in {contradiction.id for contradiction in validate_folder(folder).contradictions}
    path.unlink()
    seal(folder)
    assert "file-missing" in {contradiction.id for contradiction in validate_folder(folder).contradictions}
