"""A small contract and a report of its check, for tests of evidence: no model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aprjax.contracts.types import (
    CheckedSide,
    CheckReport,
    Contract,
    FalsificationTest,
    Metadata,
    Status,
    TestOutcome,
    Threshold,
)

OFFICIAL = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
OFFICIAL_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BAND = Threshold("ratio", "upstream's band", minimum=0.5, maximum=2.0)
COSINE = Threshold("cosine", "measured between legitimate builds", minimum=0.999)
CONTRACT_ID = "tiny-parity-v1"

YAML = """\
# A contract for tests.
metadata:
  version: "1.0.0"  # of the contract
  description: the ratio of two stages
  status: PROPOSED  # until a check says more
  kind: pattern
  references:
    - a test
falsification_tests:
  # the band first
  - id: FALSIFY-TINY-001
    rule: "the ratio lies in the band"
    prediction: between 0.5 and 2
    if_fails: the sides part
    test: python3 -m pytest tests/contracts/test_evidence.py::test_what_is_written_is_accepted
    status: PROPOSED  # moved by --discharge
    thresholds:
      - measure: ratio
        basis: upstream's band
        minimum: 0.5
        maximum: 2.0

  - id: FALSIFY-TINY-002
    rule: the cosine is near one
    prediction: at least 0.999
    if_fails: the sides part
    test: python3 -m pytest tests/contracts/test_evidence.py::test_what_is_written_is_accepted
    thresholds:
      - measure: cosine
        basis: measured between legitimate builds
        minimum: 0.999
  # a remark at the end
"""


def contract(folder: Path) -> Contract:
    """The contract in memory; its file is written by whoever needs it."""
    command = "python3 -m pytest tests/contracts/test_evidence.py::test_what_is_written_is_accepted"
    tests = (
        FalsificationTest(
            "FALSIFY-TINY-001",
            "the ratio lies in the band",
            "between 0.5 and 2",
            "the sides part",
            command,
            thresholds=(BAND,),
            status="PROPOSED",
        ),
        FalsificationTest(
            "FALSIFY-TINY-002",
            "the cosine is near one",
            "at least 0.999",
            "the sides part",
            command,
            thresholds=(COSINE,),
        ),
    )
    metadata = Metadata("1.0.0", "the ratio of two stages", ("a test",), status="PROPOSED", kind="pattern")
    return Contract(CONTRACT_ID, folder / f"{CONTRACT_ID}.yaml", metadata, falsification_tests=tests)


def outcome(test: FalsificationTest, status: Status, measured: dict[str, float | None], reason: str) -> TestOutcome:
    """What became of a test."""
    return TestOutcome(
        CONTRACT_ID,
        test.id,
        status,
        reason,
        test.rule,
        measured,
        test.thresholds,
        "python -m aprjax layers --model a.apr --ref b.gguf",
        0.25,
        ("layers.json",),
    )


def report(folder: Path, *, second: Status = Status.PASS) -> CheckReport:
    """A check of both tests: the first passes, the second ends as asked."""
    checked = contract(folder)
    one, two = checked.falsification_tests
    cosine = {Status.PASS: 0.9999, Status.FAIL: 0.9, Status.UNMEASURED: None}[second]
    sides = {
        "model": CheckedSide("a.apr", "/srv/somebody/models/a.apr", "ab" * 32, 1000, "apr", "llama.cpp", "qwen2", 290),
        "ref": CheckedSide(OFFICIAL, OFFICIAL, OFFICIAL_SHA256, 491400064, "gguf", "llama.cpp", "qwen2", 290),
    }
    return CheckReport(
        (
            outcome(one, Status.PASS, {"ratio": 1.25}, "the ratio 1.25 lies in\n[0.5, 2.0]"),
            outcome(two, second, {"cosine": cosine}, f"the cosine is {cosine}, in /srv/somebody/models/a.apr"),
        ),
        sides,
        (checked,),
        "python -m aprjax check contracts/tiny.yaml --model /srv/somebody/models/a.apr --ref " + OFFICIAL,
        "2026-11-20T10:00:00+00:00",
        1.5,
        {"layers.json": '{"path": "/srv/somebody/models/a.apr", "ratio": 1.25}\n'},
    )


def with_allowed(checked: CheckReport, *ids: str) -> CheckReport:
    """The report, with tests that may stay unmeasured."""
    return replace(checked, allowed=ids)
