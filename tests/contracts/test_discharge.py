"""`--discharge` moves statuses by evidence that holds, changes nothing else, and refuses with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from contracts_checked import CONTRACT_ID, YAML, report
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint, write_tiny

from aprjax.cli import main
from aprjax.contracts.evidence import validate_folder, write_evidence
from aprjax.contracts.evidence.discharge import Refused, discharge
from aprjax.contracts.evidence.documents import rule_digest
from aprjax.contracts.evidence.manifest import MANIFEST, digest
from aprjax.contracts.evidence.yaml_edit import EditError, YamlText
from aprjax.contracts.load import load_contract
from aprjax.contracts.types import CheckedSide, CheckReport, Status

EVIDENCE = f"evidence/{CONTRACT_ID}-2026-11-20"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without changes, whatever is being worked on."""
    monkeypatch.setattr("aprjax.contracts.facts.source_commit", lambda: ("0123456789" * 4, False))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The contract's file, in a repository's `contracts/`."""
    folder = tmp_path / "contracts"
    folder.mkdir()
    target = folder / f"{CONTRACT_ID}.yaml"
    target.write_text(YAML, encoding="utf-8")
    return target


def checked(path: Path, second: Status = Status.PASS) -> CheckReport:
    """A check of the contract as its file has it."""
    found = report(path.parent, second=second)
    contract = load_contract(path).contract
    assert contract is not None
    return replace(found, contracts=(contract,))


def evidence(path: Path, second: Status = Status.PASS) -> Path:
    return write_evidence(checked(path, second), path.parent.parent / "evidence")


def test_statuses_move_and_nothing_else_changes(path: Path) -> None:
    folder = evidence(path)
    found = discharge(validate_folder(folder), path)
    assert [(move.test_id, move.before, move.after) for move in found.moves] == [
        ("", "PROPOSED", "ACTIVE"),
        ("FALSIFY-TINY-001", "PROPOSED", "DISCHARGED"),
        ("FALSIFY-TINY-002", "PROPOSED", "DISCHARGED"),
    ]
    documents = [f"{EVIDENCE}/{CONTRACT_ID}/falsify-tiny-00{n}/discharge-evidence-v1.json" for n in (1, 2)]
    digests = [digest(path.parent.parent / document) for document in documents]

    def lines(n: int) -> str:
        return f"    evidence:\n      - path: {json.dumps(documents[n])}\n        sha256: {json.dumps(digests[n])}\n"

    expected = YAML.replace("status: PROPOSED  # until", "status: ACTIVE  # until")
    expected = expected.replace("status: PROPOSED  # moved", "status: DISCHARGED  # moved")
    expected = expected.replace("  - id: FALSIFY-TINY-001\n", "  - id: FALSIFY-TINY-001\n" + lines(0))
    expected = expected.replace(
        "  - id: FALSIFY-TINY-002\n", "  - id: FALSIFY-TINY-002\n" + lines(1) + "    status: DISCHARGED\n"
    )
    assert path.read_text(encoding="utf-8") == expected
    again = load_contract(path)
    assert again.errors == ()
    assert again.contract is not None
    assert again.contract.metadata.status == "ACTIVE"
    # What a test demands is what it was: the evidence still holds for it.
    before = checked_rules(path)
    assert before == {rule_digest(test) for test in again.contract.falsification_tests}
    with pytest.raises(Refused, match="every status stands"):
        discharge(validate_folder(folder), path)


def checked_rules(path: Path) -> set[str]:
    folder = path.parent.parent / EVIDENCE
    documents = folder.rglob("discharge-evidence-v1.json")
    return {json.loads(document.read_text(encoding="utf-8"))["rule_sha256"] for document in documents}


def test_a_later_discharge_adds_its_evidence(path: Path) -> None:
    discharge(validate_folder(evidence(path, Status.UNMEASURED)), path)
    first = load_contract(path).contract
    assert first is not None
    assert first.metadata.status == "ACTIVE_FUNCTIONAL"
    assert [test.status for test in first.falsification_tests] == ["DISCHARGED", None]
    found = discharge(validate_folder(evidence(path)), path)
    assert [move.test_id for move in found.moves] == ["", "FALSIFY-TINY-002"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_line_ends_and_a_missing_last_one_stay(path: Path, line_end: str) -> None:
    text = YAML.removesuffix("  # a remark at the end\n").rstrip("\n").replace("\n", line_end)
    path.write_bytes(text.encode())
    discharge(validate_folder(evidence(path)), path)
    after = path.read_bytes().decode()
    assert after.count("\n") == after.count(line_end)
    assert not after.endswith("\n")
    assert load_contract(path).errors == ()


def test_evidence_that_proves_nothing_moves_nothing(path: Path) -> None:
    before = path.read_bytes()
    folder = evidence(path, Status.FAIL)
    with pytest.raises(Refused, match="FALSIFY-TINY-002 failed"):
        discharge(validate_folder(folder), path)
    sound = evidence(path)
    (sound / "check.log").write_text("all is well\n", encoding="ascii")
    with pytest.raises(Refused, match=r"contradictions, the first: .*check\.log"):
        discharge(validate_folder(sound), path)
    assert path.read_bytes() == before


def test_evidence_that_proves_nothing_to_others_moves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(path)
    model, ref = found.sides["model"], found.sides["ref"]
    root = path.parent.parent / "evidence"

    def refused(reason: str, **sides: CheckedSide) -> None:
        folder = write_evidence(replace(found, sides={"model": model, "ref": ref} | sides), root)
        assert validate_folder(folder).accepted
        with pytest.raises(Refused, match=reason):
            discharge(validate_folder(folder), path)

    refused("with itself by one arithmetic", model=ref)
    refused("neither side is a file that others can get", ref=replace(ref, path="b.gguf", sha256="cd" * 32))
    monkeypatch.setattr("aprjax.contracts.facts.source_commit", lambda: ("0123456789" * 4, True))
    refused("changed since its commit")


def test_evidence_of_another_rule_moves_nothing(path: Path) -> None:
    folder = evidence(path)
    path.write_text(YAML.replace("maximum: 2.0", "maximum: 1.5"), encoding="utf-8")
    with pytest.raises(Refused, match="FALSIFY-TINY-001 demands something else today"):
        discharge(validate_folder(folder), path)


def test_evidence_of_another_contract_moves_nothing(path: Path) -> None:
    folder = evidence(path)
    other = path.with_name("other-v1.yaml")
    other.write_text(YAML, encoding="utf-8")
    with pytest.raises(Refused, match="not about other-v1"):
        discharge(validate_folder(folder), other)


def test_a_persons_status_is_no_runs_to_change(path: Path) -> None:
    path.write_text(YAML.replace("status: PROPOSED  # until", "status: demoted  # until"), encoding="utf-8")
    with pytest.raises(Refused, match="a person decides"):
        discharge(validate_folder(evidence(path)), path)


def test_a_contract_in_flow_style_is_refused(path: Path) -> None:
    text = YAML[: YAML.index("falsification_tests:")] + "falsification_tests: [{id: FALSIFY-TINY-001, rule: r, "
    path.write_text(text + "prediction: p, if_fails: f, test: python3 -m pytest x}]\n", encoding="utf-8")
    contract = load_contract(path).contract
    assert contract is not None
    one = report(path.parent)
    outcome = replace(one.outcomes[0], thresholds=(), rule="r")
    folder = write_evidence(replace(one, contracts=(contract,), outcomes=(outcome,)), path.parent.parent / "evidence")
    with pytest.raises(Refused, match="block style"):
        discharge(validate_folder(folder), path)


def test_evidence_elsewhere_is_no_reference(path: Path, tmp_path: Path) -> None:
    folder = write_evidence(checked(path), tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(Refused, match="outside the contract's repository"):
        discharge(validate_folder(folder), path)


@settings(max_examples=50, deadline=None)
@given(value=st.text(min_size=1, max_size=20))
def test_an_edit_changes_one_value_or_none(value: str) -> None:
    text = YamlText("# a\nx:\n  y: 'old'  # b\n  z: 1\n# c\n")
    try:
        text.insert_below(("x", "y"), "new", value)
    except EditError:
        return
    assert text.data == {"x": {"y": "old", "new": value, "z": 1}}
    assert text.text.startswith("# a\nx:\n  y: 'old'  # b\n")
    assert text.text.endswith("  z: 1\n# c\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x {b: 1}\nc: *x\n", "aliases"),
        ("- a\n", "mapping"),
        ("a: [\n", "no YAML"),
        ("a: {b: 1}\n", "block style"),
        ("a:\n  b: |\n    long\n  c: 1\n", "one line"),
    ],
)
def test_what_cannot_be_edited_in_place(text: str, reason: str) -> None:
    def edit() -> None:
        found = YamlText(text)
        found.replace(("a", "b"), "x") if "|" in text else found.insert_below(("a", "b"), "c", "d")

    with pytest.raises(EditError, match=reason):
        edit()


def test_lists_that_begin_on_their_keys_line_are_left_alone() -> None:
    edit = YamlText("a:\n- x: '1'\n- x: '2'  # last\n")
    edit.append(("a",), {"x": "3"})
    assert edit.text == "a:\n- x: '1'\n- x: '2'  # last\n- x: \"3\"\n"
    with pytest.raises(EditError, match="cannot be added to"):
        YamlText("a:\n- - x: '1'\n").append(("a", 0), {"x": "2"})


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evidence(path)
    with monkeypatch.context() as here:
        here.chdir(folder)
        assert main(["evidence", "."]) == 0
        assert main(["evidence", ".", "--seal"]) == 0
    capsys.readouterr()
    assert main(["evidence", str(folder), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["folders"][0]["accepted"] is True
    assert main(["evidence", str(folder), "--discharge", str(path)]) == 0
    assert "FALSIFY-TINY-001: PROPOSED → DISCHARGED" in capsys.readouterr().out
    assert main(["evidence", str(folder), "--discharge", str(path)]) == 1
    assert "refused: every status" in capsys.readouterr().err
    (folder / MANIFEST).unlink()
    assert main(["evidence", str(folder)]) == 1
    assert "manifest-missing" in capsys.readouterr().out
    assert main(["evidence", str(folder), "--seal"]) == 0
    (folder / "check.log").write_text("lies\n", encoding="ascii")
    assert main(["evidence", str(folder), "--seal"]) == 1
    assert "log-unreadable" in capsys.readouterr().out
    assert main(["evidence", str(folder / "nowhere")]) == 4
    assert main(["evidence", str(folder), str(folder), "--discharge", str(path)]) == 2
    assert main(["evidence", str(folder), "--discharge", str(path.with_name("none.yaml"))]) == 4


def test_a_checks_own_evidence_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_tiny(tmp_path / "a.apr", tiny_checkpoint()).path)
    asked = ["check", "tokenizer-parity-v1", "--model", model, "--ref", model, "--evidence", str(tmp_path / "evidence")]
    code = main(asked)
    assert code in (0, 3)  # what needs an engine may not be measured
    (folder,) = (tmp_path / "evidence").iterdir()
    assert validate_folder(folder).contradictions == ()
    capsys.readouterr()
    # The file agrees with itself: sound evidence that proves nothing.
    contract = Path(__file__).resolve().parents[2] / "contracts" / "tokenizer-parity-v1.yaml"
    before = contract.read_bytes()
    assert main(["evidence", str(folder), "--discharge", str(contract)]) == 1
    assert "with itself by one arithmetic" in capsys.readouterr().err
    assert contract.read_bytes() == before


def test_the_package_imports_without_jax() -> None:
    code = (
        "import sys, aprjax.contracts.upstream, aprjax.contracts.evidence.command, aprjax.contracts.evidence.discharge"
    )
    code += "; assert not {'jax', 'flax', 'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
