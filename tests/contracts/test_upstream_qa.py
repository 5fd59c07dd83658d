"""Reports of `apr qa` and parity receipts: upstream's bytes and numbers; skipped is never passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts_checked import report

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence import validate_folder, write_evidence
from aprjax.contracts.evidence.manifest import seal
from aprjax.contracts.types import CheckReport, Status, Threshold
from aprjax.contracts.upstream.qa import (
    GATES,
    Gate,
    parse_qa_report,
    qa_report,
    qa_report_of,
    read_qa_report,
    report_problems,
)
from aprjax.contracts.upstream.receipt import MIN_POSITIONS, parity_rows, receipt, receipt_problems

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


def rows(count: int = MIN_POSITIONS, *, spoiled: int | None = None) -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)
    ref = generator.normal(size=(count, 50)).astype(np.float32)
    model = ref + generator.normal(size=ref.shape).astype(np.float32) * np.float32(1e-3)
    if spoiled is not None:
        model[spoiled] = -ref[spoiled]
    return parity_rows(ref, model, list(range(100, 100 + count)))


def made(found: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": "qwen2.5-coder-0.5b",
        "file": "a.gguf",
        "quant": "Q4_K_M",
        "sha256": "ab" * 32,
        "threshold": 0.98,
        "threshold_source": "contracts/x.yaml",
        "comparator": {"kind": "llama_cpp", "comparator_sha": "0.3.36"},
        "host": "a machine",
        "backend": "cpu",
        "version": "aprjax 0.1.0",
        "generated_at": "2026-11-23T12:00:00+00:00",
        "provenance": {"command": "python -m aprjax check"},
    }
    return receipt(found, **asked | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "x.yaml").write_text("", encoding="ascii")
    (tmp_path / "evidence" / "x").mkdir(parents=True)
    return tmp_path / "evidence" / "x"


def test_a_row_has_upstreams_numbers() -> None:
    # Of the first row of upstream's 7B receipt (contracts.md 6): mean 0.12188…, sigma 26.33…, Cpk 8.509…: by
    # sigma = 4 / rms and Cpk = (4 - mean) / 3 rms these three belong to one rms.
    mean, sigma, cpk = 0.12188125401735306, 26.330537211297408, 8.50941249591051
    assert (4 - mean) / (3 * 4 / sigma) == pytest.approx(cpk, rel=1e-6)
    ref = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    (row,) = parity_rows(ref, ref + np.float32([[0, 0, 0, 0.5]]), [7])
    assert (row["cpu_argmax"], row["gpu_argmax"], row["max_abs_diff"], row["mean_abs_diff"]) == (3, 3, 0.5, 0.125)
    assert row["sigma_level"] == pytest.approx(4 / 0.25)
    assert row["cpk"] == pytest.approx((4 - 0.125) / 0.75)
    assert row["kl_divergence"] > 0
    assert row["verdict"] == "Pass"
    (equal,) = parity_rows(ref, ref, [7])
    assert (equal["sigma_level"], equal["cpk"], equal["kl_divergence"]) == (99.9, 99.9, 0)


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        ([4, 3, 2, 1.0], "FailCatastrophic"),
        ([1, 2, 3, 9.0], "FailDivergent"),
        ([1, 2, 4, 3.9], "WarnArgmax"),
        ([2, 4, 6, 8.1], "WarnOutOfSpec"),
        ([1, 2, 3, float("nan")], "FailNan"),
    ],
)
def test_the_verdicts_of_rows(model: list[float], verdict: str) -> None:
    ref = np.array([[1.0, 2.0, 3.0, 4.0]])
    (row,) = parity_rows(ref, np.array([model]), [7])
    assert row["verdict"] == verdict


def test_a_sound_receipt(folder: Path) -> None:
    found = made(rows())
    assert receipt_problems(json.loads(json.dumps(found)), folder) == []
    assert found["result"]["verdict"] == "PASS"
    assert found["unmeasured"] == ["none"]
    (folder / "receipt.json").write_text(json.dumps(found), encoding="utf-8")
    seal(folder)
    assert validate_folder(folder).accepted
    spoiled = made(rows(spoiled=3))
    assert receipt_problems(spoiled, folder) == []
    assert (spoiled["result"]["verdict"], spoiled["result"]["min_cosine_position"]) == ("FAIL", 3)


def test_what_was_not_measured_is_listed(folder: Path) -> None:
    short = made(rows(10), sha256=None, unmeasured=["the GPU"])
    assert receipt_problems(short, folder) == []
    assert short["result"]["verdict"] == "UNMEASURED"
    assert short["partially_receipted"] is True
    assert len(short["unmeasured"]) == 3
    with pytest.raises(ValueError, match="without a position"):
        made([])
    with pytest.raises(ValueError, match="one token per row"):
        parity_rows(np.zeros((2, 3)), np.zeros((2, 3)), [1])


RECEIPTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no comparator": (lambda d: d.pop("comparator"), "'comparator' is missing"),
    "an oracle without a name": (lambda d: d["comparator"].pop("comparator_sha"), "PRC-INV-004"),
    "itself without a reason": (lambda d: d.update(comparator={"kind": "self"}), "PRC-INV-002"),
    "itself with a binary": (lambda d: d["comparator"].update(kind="self", reason="r"), "PRC-INV-002, 003"),
    "another comparator": (lambda d: d["comparator"].update(kind="oracle"), "is none of llama_cpp"),
    "a threshold from nowhere": (lambda d: d.update(threshold_source="contracts/none.yaml"), "PRC-INV-005"),
    "a threshold from outside": (lambda d: d.update(threshold_source="../../etc/passwd"), "PRC-INV-005"),
    "a threshold of the machine": (lambda d: d.update(threshold_source="/etc/passwd"), "PRC-INV-005"),
    "another backend": (lambda d: d.update(backend="tpu"), "the backend"),
    "nothing unmeasured": (lambda d: d.update(unmeasured=[]), "written as `none`"),
    "whole and in part": (lambda d: d.update(partially_receipted=True), "contradicts what is listed"),
    "a count": (lambda d: d["result"].update(passed=99), "result.passed is 99"),
    "a raw count": (lambda d: d["raw"].update(failed=1), "raw.failed is 1"),
    "another minimum": (lambda d: d["result"].update(min_cosine=1.0), "result.min_cosine is 1.0"),
    "another verdict": (lambda d: d["result"].update(verdict="FAIL"), "the verdict is 'FAIL'"),
    "a row's verdict": (lambda d: d["raw"]["metrics"][0].update(verdict="FailDivergent"), "is called FailDivergent"),
    "an unknown verdict": (lambda d: d["raw"]["metrics"][0].update(verdict="Fine"), "which is none"),
    "a position twice": (lambda d: d["raw"]["metrics"][1].update(position=0), "a position is there twice"),
    "a row of another type": (lambda d: d["raw"]["metrics"].append("x"), "found str"),
    "a cosine as text": (lambda d: d["raw"]["metrics"][0].update(cosine_similarity="1"), "cosine_similarity"),
    "a digest that is none": (lambda d: d["cell"].update(model_sha256="x"), "64 lower-case"),
}


@pytest.mark.parametrize(("plant", "message"), RECEIPTS.values(), ids=RECEIPTS)
def test_a_receipt_that_breaks_a_rule(folder: Path, plant: Callable[[dict[str, Any]], Any], message: str) -> None:
    found = json.loads(json.dumps(made(rows())))
    plant(found)
    assert any(message in problem for problem in receipt_problems(found, folder)), receipt_problems(found, folder)


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


MARGINS: dict[str, Any] = {
    "schema": "aprjax.margins/1",
    "sides": {
        "model": {"path": "/srv/somebody/a.apr", "sha256": "ab" * 32, "format": "apr", "arithmetic": "llama.cpp"},
        "ref": {"path": "b.gguf", "sha256": "cd" * 32, "format": "trace of gguf", "arithmetic": "llama.cpp (live)"},
    },
    "tokens": [
        {
            "position": n,
            "token": 100 + n,
            "model": {"top1": 5},
            "ref": {"top1": 5 if n else 6},
            "cosine": 0.9999,
            "kl": 1e-4,
            "rms_delta": 0.25 if n else 0.0,
            "max_delta": 0.5,
        }
        for n in range(MIN_POSITIONS)
    ],
}
LEAST = Threshold("least_cosine", "measured between legitimate builds", minimum=0.999)


def with_logits(folder: Path, margins: dict[str, Any]) -> CheckReport:
    """A check with a test on the least cosine of a raw report of logits."""
    found = report(folder)
    outcome = replace(
        found.outcomes[0], thresholds=(LEAST,), measured={"least_cosine": 0.9999}, artifacts=("output-pair.json",)
    )
    tests = found.contracts[0].falsification_tests
    contract = replace(found.contracts[0], falsification_tests=(replace(tests[0], thresholds=(LEAST,)), *tests[1:]))
    artifacts = {**found.artifacts, "output-pair.json": json.dumps(margins)}
    return replace(found, outcomes=(outcome, found.outcomes[1]), contracts=(contract,), artifacts=artifacts)


def test_a_check_of_logits_has_its_receipt(tmp_path: Path) -> None:
    folder = write_evidence(with_logits(tmp_path, MARGINS), tmp_path / "elsewhere")
    assert validate_folder(folder).contradictions == ()
    path = folder / "receipts" / "output-pair.parity-receipt-v2.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["comparator"]["kind"] == "llama_cpp"
    assert found["cell"]["file"] == "a.apr"
    assert found["result"]["verdict"] == "PASS"
    assert found["raw"]["metrics"][1]["sigma_level"] == 16
    assert found["raw"]["metrics"][0]["verdict"] == "WarnArgmax"
    assert any("cpk" in entry for entry in found["unmeasured"])
    found["raw"]["metrics"][3]["kl_divergence"] = 0.0
    path.write_text(json.dumps(found), encoding="utf-8")
    seal(folder)
    assert {c.id for c in validate_folder(folder).contradictions} == {"fact-mismatch"}


def test_one_engine_is_no_oracle(tmp_path: Path) -> None:
    ref = {**MARGINS["sides"]["ref"], "arithmetic": "float32"}
    folder = write_evidence(
        with_logits(tmp_path, {**MARGINS, "sides": {**MARGINS["sides"], "ref": ref}}), tmp_path / "e"
    )
    found = json.loads((folder / "receipts" / "output-pair.parity-receipt-v2.json").read_text(encoding="utf-8"))
    assert found["comparator"]["kind"] == "self"
    assert any("ORACLE ARM" in entry for entry in found["unmeasured"])
    assert validate_folder(folder).accepted


def test_a_position_without_numbers_has_no_receipt(tmp_path: Path) -> None:
    tokens = [{**MARGINS["tokens"][0], "cosine": None}]
    folder = write_evidence(with_logits(tmp_path, {**MARGINS, "tokens": tokens}), tmp_path / "evidence")
    assert not (folder / "receipts").exists()
    assert validate_folder(folder).accepted
