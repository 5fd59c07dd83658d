"""Contract files: ours are valid, and every kind of bad file is named with its line, never with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aprjax.contracts.load import contract_files, load_contract, load_contracts
from aprjax.contracts.yaml_reader import MOST_BYTES, MOST_DEPTH

GOOD = """\
metadata:
  version: "1.0.0"
  description: what is promised
  kind: pattern
  status: ACTIVE
  references: [a paper]
equations:
  e: {formula: "x = x"}
falsification_tests:
  - id: T-1
    rule: a rule
    prediction: a prediction
    if_fails: look here
    test: python3 -m pytest tests/test_x.py::test_y
    thresholds:
      - {measure: m, maximum: 1.0e-3, basis: "a source"}
"""


def problems_of(tmp_path: Path, text: str, name: str = "x-v1.yaml") -> list[tuple[int, str, str]]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    loaded = load_contract(path)
    assert (loaded.contract is None) == bool(loaded.errors)
    return [(problem.line, problem.rule, problem.message) for problem in loaded.problems]


def only(found: list[tuple[int, str, str]]) -> tuple[int, str]:
    assert len(found) == 1, found
    return found[0][:2]


def test_our_contracts_are_valid() -> None:
    loaded = load_contracts(contract_files())
    assert [problem for one in loaded for problem in one.problems] == []
    assert len(loaded) >= 15
    for one in loaded:
        assert one.contract is not None
        for test in one.contract.falsification_tests:
            assert test.not_applicable or test.thresholds, test.id
            assert test.not_applicable or test.test, test.id


def test_a_good_contract_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "good-v1.yaml"
    path.write_text(GOOD, encoding="utf-8")
    contract = load_contract(path).contract
    assert contract is not None
    assert contract.id == "good-v1"
    assert contract.falsification_tests[0].threshold("m").maximum == pytest.approx(1e-3)
    assert contract.line("falsification_tests", 0, "rule") == 11
    assert contract.line("falsification_tests", 0, "thresholds", 0, "maximum") == 16


def test_upstreams_other_names_are_read(tmp_path: Path) -> None:
    text = (
        GOOD.replace("prediction:", "expected:").replace("if_fails:", "fails_if:").replace("    test:", "    command:")
    )
    assert problems_of(tmp_path, text) == []
    twice = GOOD.replace("    test:", "    command: python3 -m pytest a.py::b\n    test:")
    assert only(problems_of(tmp_path, twice))[1] == "SCHEMA-020"


@pytest.mark.parametrize(
    ("old", "new", "line", "rule"),
    [
        ("1.0e-3", "1e-3", 16, "CONTRACT-NUMBER"),
        ("1.0e-3", "'0.001'", 16, "CONTRACT-TYPE"),
        ("1.0e-3", ".inf", 16, "CONTRACT-NUMBER"),
        ("status: ACTIVE", "status: DONE", 5, "CONTRACT-STATUS"),
        ("kind: pattern", "kind: kernels", 4, "CONTRACT-VALUE"),
        ("    rule:", "    rules:", 10, "CONTRACT-KEY"),
        ("description:", "descripton:", 3, "CONTRACT-KEY"),
        ('version: "1.0.0"', "version: 1.0", 2, "CONTRACT-TYPE"),
        ('version: "1.0.0"', "version: 2026-11-23", 2, "CONTRACT-TYPE"),
        ("description: what is promised", "description: no", 3, "CONTRACT-TYPE"),
        ("    rule: a rule", "    rule: a rule\n    rule: another", 12, "SCHEMA-020"),
        ("references: [a paper]", "references: []", 6, "SCHEMA-001"),
        ('version: "1.0.0"', "version: ''", 2, "SCHEMA-002"),
        ("prediction: a prediction", "prediction: ''", 12, "SCHEMA-008"),
        ("if_fails: look here", "if_fails: ''", 13, "SCHEMA-009"),
        ("equations:", "equation:", 7, "SCHEMA-019"),
        ("equations:", "invariants: 3\nequations:", 7, "CONTRACT-KEY"),
        ("equations:", "kind: kernel\nequations:", 7, "SCHEMA-018"),
        ("references: [a paper]", "references: [&a a paper, *a]", 6, "CONTRACT-ALIAS"),
        ("references: [a paper]", "references: !!python/name:os.system ''", 6, "CONTRACT-TAG"),
        ('basis: "a source"', "basis: ''", 16, "CONTRACT-BASIS"),
        ("maximum: 1.0e-3, ", "", 16, "CONTRACT-THRESHOLD"),
        ("    test: python3", "    na_reason: none\n    test: python3", 14, "SCHEMA-023"),
        ("    test: python3", "    not_applicable: true\n    test: python3", 10, "SCHEMA-021"),
    ],
)
def test_bad_contracts_are_named_with_their_line(tmp_path: Path, old: str, new: str, line: int, rule: str) -> None:
    found = problems_of(tmp_path, GOOD.replace(old, new, 1))
    assert (line, rule) in [place[:2] for place in found], found


def test_files_that_are_no_contract(tmp_path: Path) -> None:
    assert only(problems_of(tmp_path, "- a\n- b\n")) == (1, "CONTRACT-YAML")
    assert only(problems_of(tmp_path, "")) == (1, "CONTRACT-YAML")
    assert only(problems_of(tmp_path, "metadata: [\n")) == (2, "CONTRACT-YAML")
    assert only(problems_of(tmp_path, f"{GOOD}---\n{GOOD}"))[1] == "CONTRACT-YAML"
    path = tmp_path / "latin.yaml"
    path.write_bytes("metadata:\n  description: Größe\n".encode("latin-1"))
    assert [(p.line, p.rule) for p in load_contract(path).problems] == [(2, "CONTRACT-YAML")]


def test_bombs_are_refused_at_once(tmp_path: Path) -> None:
    laughs = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    laughs += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert only(problems_of(tmp_path, "\n".join(laughs))) == (2, "CONTRACT-ALIAS")
    assert only(problems_of(tmp_path, "metadata: " + "[" * 5000)) == (1, "CONTRACT-DEPTH")
    deep = "".join("  " * n + "a:\n" for n in range(MOST_DEPTH + 1))
    assert only(problems_of(tmp_path, deep))[1] == "CONTRACT-DEPTH"
    assert only(problems_of(tmp_path, GOOD + "#" * MOST_BYTES)) == (0, "CONTRACT-SIZE")
    assert only(problems_of(tmp_path, GOOD.replace("1.0e-3", "9" * 5000)))[1] == "CONTRACT-YAML"


def test_a_kernel_is_held_to_more(tmp_path: Path) -> None:
    rules = {rule for _, rule, _ in problems_of(tmp_path, GOOD.replace("kind: pattern", "kind: kernel"))}
    assert {"PROVABILITY-001", "SCHEMA-013"} <= rules
    unfounded = GOOD.replace("kind: pattern", "kind: kernel").replace("x = x", "")
    assert "SCHEMA-004" in {rule for _, rule, _ in problems_of(tmp_path, unfounded)}


def test_obligations_and_harnesses(tmp_path: Path) -> None:
    extra = """\
proof_obligations:
  - {type: invariant, property: "", formal: f, requires: r, applies_to_phase: p, parent_contract: q}
  - {type: subcontract, property: p, formal: f, parent_contract: missing-v1}
  - {type: bound, property: p, applies_to: not_applicable}
  - {type: bound, property: p, na_owner: nobody}
kani_harnesses:
  - {id: K, obligation: ""}
  - {id: K, obligation: o, bound: 3}
"""
    found = {(line, rule) for line, rule, _ in problems_of(tmp_path, GOOD + extra)}
    first = len(GOOD.splitlines()) + 2
    assert {(first, rule) for rule in ("SCHEMA-005", "SCHEMA-014", "SCHEMA-015", "SCHEMA-016")} <= found
    assert {(first + 1, "SCHEMA-006"), (first + 1, "SCHEMA-017")} <= found
    assert {(first + 2, "SCHEMA-021"), (first + 2, "SCHEMA-022"), (first + 3, "SCHEMA-023")} <= found
    assert {(first + 5, "SCHEMA-011"), (first + 5, "SCHEMA-012"), (first + 6, "SCHEMA-010")} <= found


def test_cycles_and_missing_dependencies(tmp_path: Path) -> None:
    for name, needed in (("a", "b-v1"), ("b", "c-v1"), ("c", "a-v1"), ("d", "nowhere-v1")):
        text = GOOD.replace("T-1", f"T-{name}").replace("  status", f"  depends_on: [{needed}]\n  status")
        (tmp_path / f"{name}-v1.yaml").write_text(text, encoding="utf-8")
    loaded = load_contracts(contract_files([tmp_path]))
    found = [(p.path.name, p.line, p.rule, p.message) for one in loaded for p in one.problems]
    assert [item[:3] for item in found] == [("a-v1.yaml", 5, "CONTRACT-CYCLE"), ("d-v1.yaml", 5, "CONTRACT-DEPENDS")]
    assert "a-v1 → b-v1 → c-v1 → a-v1" in found[0][3]


def test_one_id_names_one_test(tmp_path: Path) -> None:
    twice = GOOD + GOOD[GOOD.index("  - id") :]
    assert only(problems_of(tmp_path, twice)) == (17, "SCHEMA-007")
    for name in ("a", "b"):
        (tmp_path / f"{name}-v1.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "x-v1.yaml").unlink()
    rules = [problem.rule for one in load_contracts(contract_files([tmp_path])) for problem in one.problems]
    assert rules == ["SCHEMA-007"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["metadata", "equations", "falsification_tests", "qa_gate", "layer_steps"]), values)
def test_no_value_anywhere_becomes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, section: str, value: object
) -> None:
    document = {**yaml.safe_load(GOOD), section: value}
    path = tmp_path_factory.getbasetemp() / "made-up.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    loaded = load_contract(path)
    assert loaded.contract is not None or loaded.errors
    assert all(problem.line >= 0 and problem.message for problem in loaded.problems)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_no_text_becomes_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    loaded = load_contract(path)
    assert loaded.contract is None
    assert loaded.errors
