"""All that `lint` judges of contracts: the schema, the bound tests, and the evidence that a status stands on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprjax.contracts.lint.bindings import Binding, BindingError, Collected, collect, parse_command, problem_of
from aprjax.contracts.load import Loaded, load_contracts
from aprjax.contracts.problems import Problem
from aprjax.contracts.types import Contract, EvidenceFile, FalsificationTest

SCHEMA = "aprjax.lint/1"
# Statuses that say of a test that it was run on a real model: they stand on committed files.
_NEED_EVIDENCE = ("FUNCTIONAL", "DISCHARGED")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LintReport:
    """The answer of `lint`.

    Attributes:
        root: the folder that paths in contracts begin at.
        contracts: files, with the number of their tests (0 where a contract is not valid).
        problems: by file and line.
        bound: tests of contracts that are bound to a test of pytest.
        collected: how many tests pytest collects of the bound files; None where it was not asked.
    """

    root: Path
    contracts: tuple[tuple[Path, int], ...]
    problems: tuple[Problem, ...]
    bound: int
    collected: int | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are not mere warnings."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def exit_code(self) -> int:
        """1 with an error, 0 otherwise."""
        return int(bool(self.errors))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "schema": SCHEMA,
            "errors": len(self.errors),
            "warnings": len(self.problems) - len(self.errors),
            "contracts": [{"path": str(path), "tests": tests} for path, tests in self.contracts],
            "bound": self.bound,
            "collected": self.collected,
            "problems": [problem.to_json() for problem in self.problems],
        }

    def to_frame(self) -> Any:
        """A row per problem as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([asdict(problem) for problem in self.problems])

    def top(self, k: int = 10) -> list[Problem]:
        """The first k problems, errors first."""
        return sorted(self.problems, key=lambda problem: problem.severity)[:k]

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(f"<li><code>{escape(str(problem))}</code></li>" for problem in self.problems)
        return f"<p>{len(self.errors)} errors in {len(self.contracts)} contracts</p><ul>{rows}</ul>"


def lint(
    files: Sequence[Path],
    *,
    root: Path | None = None,
    with_pytest: bool = True,
    collector: Callable[[Path, set[str]], Collected] = collect,
) -> LintReport:
    """Judges contracts.

    Args:
        files: the contracts.
        root: where the paths of tests and evidence begin; by default the nearest folder above the first contract
            that has a `tests` folder or a `pyproject.toml`.
        with_pytest: ask pytest which tests it collects (one run, which imports the test files).
        collector: what asks it.

    Raises:
        OSError: a contract cannot be opened.
    """
    root = (root or root_of(files)).resolve()
    loaded = load_contracts(files)
    problems = [problem for one in loaded for problem in one.problems]
    contracts = [one.contract for one in loaded if one.contract is not None]
    bindings, found = _bindings(contracts, root)
    problems += found
    collected = None
    if with_pytest:
        asked = collector(root, {binding.path for _, _, binding in bindings})
        problems += _not_collected(bindings, asked)
        collected = len(asked.nodes)
    for contract in contracts:
        problems += _evidence(contract, root)
    return LintReport(
        root=root,
        contracts=tuple((one.path, _tests(one)) for one in loaded),
        problems=tuple(sorted(dict.fromkeys(problems))),
        bound=len({(contract.id, name) for contract, (_, name), _ in bindings}),
        collected=collected,
    )


def root_of(files: Sequence[Path]) -> Path:
    """The nearest folder above the first contract that looks like a repository's root."""
    first = files[0].resolve().parent if files else Path.cwd()
    marks = ("pyproject.toml", "tests")
    return next((f for f in [first, *first.parents] if any((f / mark).exists() for mark in marks)), first)


def _tests(one: Loaded) -> int:
    return 0 if one.contract is None else len(one.contract.falsification_tests)


# A contract, the place of a command in it with the test's id, and what the command names.
_Bound = tuple[Contract, tuple[tuple[str | int, ...], str], Binding]


def _commands(contract: Contract) -> Iterator[tuple[tuple[str | int, ...], str, str, bool]]:
    """(place, id, command, whether a single test has to be named) of everything in a contract that binds a test."""
    for index, test in enumerate(contract.falsification_tests):
        if test.test is not None:
            yield ("falsification_tests", index, "test"), test.id, test.test, not test.not_applicable
    for index, harness in enumerate(contract.kani_harnesses):
        if harness.harness is not None:
            yield ("kani_harnesses", index, "harness"), harness.id, harness.harness, False


def _bindings(contracts: Sequence[Contract], root: Path) -> tuple[list[_Bound], list[Problem]]:
    bound: list[_Bound] = []
    problems: list[Problem] = []
    for contract in contracts:
        for index, test in enumerate(contract.falsification_tests):
            if test.test is None and not test.not_applicable:
                line = contract.line("falsification_tests", index)
                text = f"{test.id} is bound to no test: give `test: python3 -m pytest FILE::TEST`"
                problems.append(Problem(contract.path, line, "BINDING-MISSING", text))
        for place, name, command, single in _commands(contract):
            line = contract.line(*place)
            try:
                named = parse_command(command)
            except BindingError as error:
                problems.append(Problem(contract.path, line, "BINDING-COMMAND", f"{name}: {error}"))
                continue
            for binding in named:
                if single and binding.name is None:
                    text = f"{name}: {binding.path} is a whole file: name the test that breaks this rule"
                    problems.append(Problem(contract.path, line, "BINDING-COMMAND", text, "warning"))
                found = problem_of(root, binding)
                if found is not None:
                    problems.append(Problem(contract.path, line, found[0], f"{name}: {found[1]}"))
                else:
                    bound.append((contract, (place, name), binding))
    return bound, problems


def _not_collected(bindings: Sequence[_Bound], asked: Collected) -> Iterator[Problem]:
    for contract, (place, name), binding in bindings:
        if not asked.has(binding):
            why = f" ({asked.error})" if asked.error else ""
            text = f"{name}: pytest does not collect {binding.node}{why}"
            yield Problem(contract.path, contract.line(*place), "BINDING-COLLECTED", text)


def _evidence(contract: Contract, root: Path) -> Iterator[Problem]:
    for index, test in enumerate(contract.falsification_tests):
        place = ("falsification_tests", index)
        stated = test.discharge_status or test.status
        if stated in _NEED_EVIDENCE and not test.evidence:
            line = contract.line(*place, "status")
            text = f"{test.id} is {stated}, and no `evidence` with path and sha256 says on what"
            yield Problem(contract.path, line, "EVIDENCE-MISSING", text)
        for number, evidence in enumerate(test.evidence):
            line = contract.line(*place, "evidence", number)
            found = _altered(root, evidence)
            if found is not None:
                yield Problem(contract.path, line, found[0], f"{test.id}: {found[1]}")
        for number, name in enumerate(test.evidence_discharged_by):
            line = contract.line(*place, "evidence_discharged_by", number)
            yield from _discharged_by(contract, line, test, root, name)


def _altered(root: Path, evidence: EvidenceFile) -> tuple[str, str] | None:
    path = evidence.path
    if not _below(root, path):
        return "EVIDENCE-MISSING", f"the evidence {path!r} lies outside the repository"
    if not (root / path).is_file():
        return "EVIDENCE-MISSING", f"the evidence {path} is not there"
    found = _sha256(root / path)
    if found == evidence.sha256:
        return None
    text = f"{path} has SHA-256 {found[:16]}…, the contract says {evidence.sha256[:16]}…: it was altered"
    return "EVIDENCE-SHA256", text


def _discharged_by(contract: Contract, line: int, test: FalsificationTest, root: Path, name: str) -> Iterator[Problem]:
    """Upstream appends remarks in parentheses; what is left is a path, a test's id, or prose."""
    path = re.sub(r"\s*\(.*\)\s*$", "", name, flags=re.DOTALL).strip()
    path, _, node = path.partition("::")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", path):
        return
    if not _below(root, path) or not (root / path).exists():
        text = f"{test.id}: evidence_discharged_by names {path}, which is not there"
        yield Problem(contract.path, line, "EVIDENCE-MISSING", text)
    elif node and path.endswith(".py"):
        found = problem_of(root, Binding(path, None, node.partition("[")[0].rpartition("::")[2]))
        if found is not None:
            yield Problem(contract.path, line, found[0], f"{test.id}: {found[1]}")


def _below(root: Path, path: str) -> bool:
    return not Path(path).is_absolute() and (root / path).resolve().is_relative_to(root)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
