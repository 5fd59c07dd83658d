"""`lint` finds each of the defects that are planted in copies of our contracts, and nothing in the originals."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aprjax.contracts.lint.assertions import asserts, find, parse, skip_of
from aprjax.contracts.lint.bindings import BindingError, Collected, collect, parse_command
from aprjax.contracts.lint.lint import LintReport, lint
from aprjax.contracts.load import contract_files, shipped_folder

ROOT = Path(__file__).resolve().parents[2]
COPIED = "gguf-prompt-sensitivity-v1.yaml"
BOUND = "tests/contracts/test_rules_generation.py"
# What stands in the copies in place of our own test of that name.
TESTS = """\
import pytest

def check(value):
    assert value > 1

def test_sensitivity():
    check(2)

def test_nothing():
    print("sensitivity", 3)

@pytest.mark.skip(reason="later")
def test_skipped():
    assert 1 > 0

@pytest.mark.xfail
def test_may_fail():
    assert 1 > 0

def test_true():
    assert True

def test_gives_up():
    pytest.skip("no model")
    assert 1 > 0

class Helper:
    def test_inside(self):
        assert 1 > 0
"""


def everything(root: Path, paths: set[str]) -> Collected:
    """Collects what a test file's source says, without asking pytest."""
    nodes = {f"{path}::{name}" for path in paths for name in parse(root / path).functions if name.startswith("test")}
    return Collected(frozenset(nodes))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small repository: a copy of one of our contracts, its test, and a file of evidence."""
    (tmp_path / "contracts").mkdir()
    shutil.copy(shipped_folder() / COPIED, tmp_path / "contracts" / COPIED)
    target = tmp_path / BOUND
    target.parent.mkdir(parents=True)
    target.write_text(TESTS, encoding="utf-8")
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "log.txt").write_text("3 tests pass\n", encoding="utf-8")
    return tmp_path


def changed(copy: Path, old: str, new: str, *, times: int = 1) -> LintReport:
    path = copy / "contracts" / COPIED
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, times), encoding="utf-8")
    return lint([path], collector=everything)


def evidence(path: str, digest: str, status: str = "DISCHARGED") -> str:
    return f"    status: {status}\n    evidence:\n      - {{path: {path}, sha256: {digest}}}\n    if_fails:"


DIGEST = hashlib.sha256(b"3 tests pass\n").hexdigest()
NAMED = "::test_sensitivity"
DEFECTS: dict[str, tuple[str, str, str]] = {
    "a bound file that is not there": ("test_rules_generation.py", "test_gone.py", "BINDING-MISSING"),
    "a bound test that is not there": (NAMED, "::test_gone", "BINDING-MISSING"),
    "a test that asserts nothing": (NAMED, "::test_nothing", "BINDING-ASSERTS"),
    "a test that asserts what is always true": (NAMED, "::test_true", "BINDING-ASSERTS"),
    "a skipped test": (NAMED, "::test_skipped", "BINDING-SKIPPED"),
    "a test that may fail": (NAMED, "::test_may_fail", "BINDING-SKIPPED"),
    "a test that skips itself": (NAMED, "::test_gives_up", "BINDING-SKIPPED"),
    "a test that pytest does not collect": (NAMED, "::Helper::test_inside", "BINDING-COLLECTED"),
    "a command that is no test": ("python3 -m pytest", "echo", "BINDING-COMMAND"),
    "a command that swallows the failure": (NAMED, "::test_sensitivity || true", "BINDING-COMMAND"),
    "an option that leaves the test out": (NAMED, "::test_sensitivity -k nothing", "BINDING-COMMAND"),
    "no bound test at all": ("    test: ", "    name: ", "BINDING-MISSING"),
    "an unknown status": ("status: ACTIVE_FUNCTIONAL", "status: DONE", "CONTRACT-STATUS"),
    "an unknown status of a test": ("    if_fails:", "    status: PASSED\n    if_fails:", "CONTRACT-STATUS"),
    "missing evidence": ("    if_fails:", evidence("evidence/gone.txt", DIGEST), "EVIDENCE-MISSING"),
    "altered evidence": ("    if_fails:", evidence("evidence/log.txt", "f" * 64), "EVIDENCE-SHA256"),
    "evidence outside the repository": ("    if_fails:", evidence("../log.txt", DIGEST), "EVIDENCE-MISSING"),
    "discharged by nothing": ("    if_fails:", "    status: DISCHARGED\n    if_fails:", "EVIDENCE-MISSING"),
    "discharged by a file that is not there": (
        "    if_fails:",
        '    evidence_discharged_by: ["evidence/gone/findings.json (live)"]\n    if_fails:',
        "EVIDENCE-MISSING",
    ),
    "a duplicate id": ("PROMPT-SENS-002", "PROMPT-SENS-001", "SCHEMA-007"),
    "a number that is text": ("minimum: 2", "minimum: 2e-3", "CONTRACT-NUMBER"),
    "a threshold without a basis": ('basis: "upstream\'s cardinality"', 'basis: ""', "CONTRACT-BASIS"),
    "an unknown key": ("    rule:", "    rulle: x\n    rule:", "CONTRACT-KEY"),
    "a dependency that is not there": ("  kind:", "  depends_on: [gone-v1]\n  kind:", "CONTRACT-DEPENDS"),
}


def test_the_copy_is_clean(copy: Path) -> None:
    report = lint([copy / "contracts" / COPIED], collector=everything)
    assert report.problems == ()
    assert (report.exit_code, report.bound, report.root) == (0, 3, copy)
    sound = changed(copy, "    if_fails:", evidence("evidence/log.txt", DIGEST))
    assert sound.problems == ()


@pytest.mark.parametrize(("old", "new", "rule"), DEFECTS.values(), ids=DEFECTS)
def test_every_planted_defect_is_found(copy: Path, old: str, new: str, rule: str) -> None:
    report = changed(copy, old, new)
    assert rule in {problem.rule for problem in report.errors}
    assert report.exit_code == 1
    assert all(problem.line > 0 for problem in report.errors)
    assert str(report.errors[0]).startswith(str(copy / "contracts" / COPIED) + ":")


def test_a_problem_is_reported_once(copy: Path) -> None:
    report = changed(copy, NAMED, "::test_nothing")
    assert [problem.rule for problem in report.problems] == ["BINDING-ASSERTS"]
    assert report.to_json()["errors"] == 1
    assert report.top(1) == [report.problems[0]]


@pytest.mark.thorough
def test_pytest_itself_is_asked(copy: Path) -> None:
    found = collect(copy, {BOUND, "tests/none.py"})
    assert found.error == ""
    assert f"{BOUND}::test_sensitivity" in found.nodes
    assert not any("Helper" in node for node in found.nodes)
    (copy / BOUND).write_text(
        "import nothing_of_that_name\n\ndef test_sensitivity():\n    assert 1 > 0\n", encoding="utf-8"
    )
    parse.cache_clear()
    report = lint([copy / "contracts" / COPIED])
    assert {problem.rule for problem in report.errors} == {"BINDING-COLLECTED"}
    assert "cannot collect" in report.errors[0].message


def test_our_contracts_bind_tests_that_assert() -> None:
    report = lint(contract_files(), root=ROOT, with_pytest=False)
    assert [str(problem) for problem in report.errors] == []
    # Every test that is measured is bound, and so are many that are not about two sides.
    assert report.bound > 80


@pytest.mark.thorough
def test_pytest_collects_all_that_our_contracts_bind() -> None:
    report = lint(contract_files(), root=ROOT)
    assert [str(problem) for problem in report.errors] == []


@pytest.mark.parametrize(
    "command", ["cargo test x", "python3 -m pytest", "python3 -m pytest /etc/x.py", "pytest a.py", ""]
)
def test_commands_that_bind_nothing(command: str) -> None:
    with pytest.raises(BindingError):
        parse_command(command)


def test_commands_are_taken_apart() -> None:
    found = parse_command("python3 -m pytest tests/a.py::test_b tests/c.py::TestD::test_e[1-x] tests/f.py")
    assert [binding.node for binding in found] == ["tests/a.py::test_b", "tests/c.py::TestD::test_e", "tests/f.py"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("assert x", True),
        ("assert f(x) == f(x)", True),
        ("assert x == x", False),
        ("assert (x, 'always true')", False),
        ("with pytest.raises(ValueError):\n        f()", True),
        ("np.testing.assert_array_equal(x, y)", True),
        ("def inner():\n        assert x\n    inner()", True),
        ("raise AssertionError", True),
        ("x == 1", False),
        ("helper(x)", False),
    ],
)
def test_what_counts_as_asserting(tmp_path: Path, body: str, expected: bool) -> None:
    path = tmp_path / f"test_{abs(hash(body))}.py"
    path.write_text(f"def helper(x):\n    return helper(x)\n\ndef test_it():\n    {body}\n", encoding="utf-8")
    source = parse(path)
    function = find(source, "test_it")
    assert function is not None
    assert asserts(source, function) is expected


def test_a_helper_of_another_file_counts(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text("def agree(a, b):\n    assert a == b\n", encoding="utf-8")
    path = tmp_path / "test_with_helper.py"
    path.write_text("from checks import agree\n\ndef test_it():\n    agree(1, 2)\n", encoding="utf-8")
    source = parse(path)
    function = find(source, "test_it")
    assert function is not None
    assert asserts(source, function)
    assert skip_of(source, function) == ""


def test_a_module_that_skips_itself(tmp_path: Path, copy: Path) -> None:
    target: Callable[[str], LintReport] = lambda text: changed_tests(copy, text)  # noqa: E731
    assert "BINDING-SKIPPED" in {
        p.rule for p in target("import pytest\npytestmark = pytest.mark.skip\n" + TESTS).errors
    }
    alone = "import pytest\npytest.skip('no', allow_module_level=True)\n"
    assert "BINDING-SKIPPED" in {p.rule for p in target(alone + TESTS).errors}


def changed_tests(copy: Path, text: str) -> LintReport:
    (copy / BOUND).write_text(text, encoding="utf-8")
    parse.cache_clear()
    return lint([copy / "contracts" / COPIED], collector=everything)
