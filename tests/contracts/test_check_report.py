"""The report of a check: what is counted, what decides the exit code, and the command line around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from contract_sides import outcome_of, write_pair

from aprjax.cli import main
from aprjax.contracts.check.measurement import Measurement
from aprjax.contracts.check.run import load_rules
from aprjax.contracts.load import contract_files, load_contracts
from aprjax.contracts.types import CheckReport, Contract, Status

QUICK = ("format-parity-v1", "tokenizer-parity-v1", "publish-manifest-v1")


@pytest.fixture(scope="module")
def contracts() -> list[Contract]:
    return [one.contract for one in load_contracts(contract_files()) if one.contract is not None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    apr, gguf = write_pair(tmp_path_factory.mktemp("pair"))
    return str(apr), str(gguf)


def report_of(*measurements: Measurement, contracts: list[Contract], allowed: tuple[str, ...] = ()) -> CheckReport:
    ids = ("FALSIFY-QS-002", "FALSIFY-QS-003", "FALSIFY-QS-004")
    outcomes = tuple(outcome_of(name, found) for name, found in zip(ids, measurements, strict=False))
    return CheckReport(outcomes, {}, tuple(contracts), allowed=allowed)


PASS = Measurement({"decreases": 0, "tensors_not_finite": 0, "largest_offset": 0.0})
FAIL = Measurement({"decreases": 1, "tensors_not_finite": 1, "largest_offset": 0.5})
OPEN = Measurement(unmeasured="it is not here")


def test_counts_and_exit_codes(contracts: list[Contract]) -> None:
    report = report_of(PASS, FAIL, OPEN, contracts=contracts)
    assert [report.count(status) for status in Status] == [1, 1, 1]
    assert report.exit_code == 1
    assert report_of(PASS, PASS, OPEN, contracts=contracts).exit_code == 3
    assert report_of(PASS, PASS, PASS, contracts=contracts).exit_code == 0
    # A user may say that a test need not be measured; nothing may say that a failure does not count.
    assert report_of(PASS, PASS, OPEN, contracts=contracts, allowed=("FALSIFY-QS-004",)).exit_code == 0
    assert report_of(PASS, PASS, FAIL, contracts=contracts, allowed=("FALSIFY-QS-004",)).exit_code == 1
    # Nothing measured at all is not a success.
    assert report_of(OPEN, contracts=contracts, allowed=("FALSIFY-QS-002",)).exit_code == 3
    assert report.to_json()["passed"] == 1
    assert report.top(1)[0].status is Status.FAIL


def test_an_outcome_says_why(contracts: list[Contract]) -> None:
    failed = outcome_of("FALSIFY-QS-003", Measurement({"tensors_not_finite": 2}, "first blk.0"))
    assert failed.reason == "tensors_not_finite = 2, expected = 0; first blk.0"
    assert failed.basis
    # What a rule does not measure has not passed, whatever else it measured.
    absent = outcome_of("FALSIFY-QS-003", Measurement({"something": 0}))
    assert absent.status is Status.UNMEASURED
    nan = outcome_of("APRJAX-Q8K-001", Measurement({"largest_error_in_steps": float("nan")}))
    assert nan.status is Status.FAIL
    assert "no finite value" in nan.reason
    json.dumps(nan.to_json(), allow_nan=False)


def test_every_test_is_reported(contracts: list[Contract]) -> None:
    """Every test of our contracts is measured by a rule, or said not to be about two sides."""
    rules = load_rules()
    tests = {test.id: test for contract in contracts for test in contract.falsification_tests}
    measured = {name for name, test in tests.items() if not test.not_applicable}
    assert measured - set(rules) == set()
    # A rule without a test could never run.
    assert set(rules) - measured == set()


def test_two_checks_report_the_same(pair: tuple[str, str], tmp_path: Path) -> None:
    documents = []
    for number in (1, 2):
        target = tmp_path / f"{number}.json"
        code = main(["check", *QUICK, "--model", pair[0], "--ref", pair[1], "--json", str(target)])
        documents.append(json.loads(target.read_text()))
        assert code == 3  # the published digest of a made-up model is not known
    for document in documents:
        assert document.pop("started")
        assert document.pop("seconds") >= 0
        for found in document["outcomes"]:
            found.pop("seconds")
    assert documents[0] == documents[1]
    statuses = {found["test_id"]: found["status"] for found in documents[0]["outcomes"]}
    assert statuses["APRJAX-FORMAT-001"] == statuses["APRJAX-TOKENIZER-002"] == "pass"


def test_one_test_alone_and_the_report_folder(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    arguments = ["check", "--test", "APRJAX-FORMAT-001", "--model", pair[0], "--ref", pair[1], "--report", str(folder)]
    assert main(arguments) == 0
    assert "1 passed, 0 failed, 0 unmeasured" in capsys.readouterr().out
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "APRJAX-FORMAT-001" in page
    assert json.loads((folder / "check.json").read_text())["passed"] == 1
    assert json.loads((folder / "files.json").read_text())["compared"] == 39


def test_a_broken_side_is_named(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *QUICK, "--model", str(tmp_path / "gone.apr"), "--ref", pair[1]]) == 4
    assert "gone.apr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gone-v1"], 4, "no such file"),
        (["format-parity-v1", "--test", "NO-SUCH-TEST"], 4, "NO-SUCH-TEST"),
        (["format-parity-v1", "--allow-unmeasured", "FALSIFY-QS-001"], 4, "FALSIFY-QS-001"),
        (["format-parity-v1", "--arithmetic", "float32", "--ref-arithmetic", "float32"], 2, ""),
    ],
)
def test_what_cannot_be_asked(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert main(["check", *arguments, "--model", pair[0], "--ref", pair[1]]) == code
    assert said in capsys.readouterr().err


def test_a_bad_contract_ends_with_its_lines(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad-v1.yaml"
    bad.write_text("metadata:\n  version: 1e-3\n  colour: red\n", encoding="utf-8")
    assert main(["check", str(bad), "--model", pair[0], "--ref", pair[1]]) == 4
    message = capsys.readouterr().err
    assert f"{bad}:2" in message
    assert f"{bad}:3" in message
    assert main(["lint", str(bad)]) == 1
    assert main(["lint", str(tmp_path / "gone.yaml")]) == 4


def test_allowing_is_part_of_the_report(contracts: list[Contract]) -> None:
    report = replace(report_of(PASS, PASS, OPEN, contracts=contracts), allowed=("FALSIFY-QS-004",))
    assert report.to_json()["allowed_unmeasured"] == ["FALSIFY-QS-004"]
    assert report.not_applicable
    assert {outcome.test_id for outcome in report.required} == {"FALSIFY-QS-002", "FALSIFY-QS-003"}
    html = report._repr_html_()
    assert "unmeasured" in html
