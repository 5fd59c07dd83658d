"""Parity receipts: upstream's numbers, its rules, and what a check's raw logits come to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts_checked import report

from aprjax.contracts.evidence import validate_folder, write_evidence
from aprjax.contracts.evidence.manifest import seal
from aprjax.contracts.types import CheckReport, Threshold
from aprjax.contracts.upstream.receipt import MIN_POSITIONS, parity_rows, receipt, receipt_problems


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


MARGINS: dict[str, Any] = {
    "schema": "aprjax.margins/1",
    "sides": {
        "model": {
            "path": "/srv/somebody/a-q4_k_m.apr",
            "sha256": "ab" * 32,
            "format": "apr",
            "arithmetic": "llama.cpp",
        },
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
    assert found["cell"]["file"] == "a-q4_k_m.apr"
    assert found["cell"]["quant"] == "Q4_K_M"
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
