"""From a contract's `test` to the test that is bound to it: there, collected by pytest, asserting, not skipped."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aprjax.contracts.lint.assertions import NoSource, asserts, find, parse, skip_of

# Collecting imports the tests' modules, jax among them; a loaded machine takes a minute for what takes seconds.
COLLECT_SECONDS = 300
_PYTEST = re.compile(r"python3? -m pytest\b")
_SHELL = re.compile(r"[;&|<>`$]")


@dataclass(frozen=True)
class Binding:
    """What a contract's `test` names.

    Attributes:
        path: of the test file, from the repository's root.
        class_name: of the class that holds the test; None for a function.
        name: of the test; None for all of the file.
    """

    path: str
    class_name: str | None = None
    name: str | None = None

    @property
    def node(self) -> str:
        """As pytest names it."""
        return "::".join(part for part in (self.path, self.class_name, self.name) if part is not None)


class BindingError(Exception):
    """The command binds nothing; the message says why."""


def parse_command(command: str) -> tuple[Binding, ...]:
    """The tests that a command runs.

    Raises:
        BindingError: it is not `python3 -m pytest FILE[::TEST] …` and nothing else.
    """
    if not _PYTEST.match(command.strip()) or _SHELL.search(command):
        raise BindingError("expected `python3 -m pytest FILE::TEST`: nothing else is known to run and assert")
    try:
        words = shlex.split(command)[3:]
    except ValueError as error:
        raise BindingError(f"the command cannot be taken apart: {error}") from None
    options = [word for word in words if word.startswith("-")]
    if options:
        raise BindingError(f"the option {options[0]} may leave the test out: name the test by FILE::TEST")
    if not words:
        raise BindingError("no test file is named")
    return tuple(_binding(word) for word in words)


def _binding(word: str) -> Binding:
    path, *names = word.split("::")
    if Path(path).is_absolute() or ".." in Path(path).parts or not path.endswith(".py"):
        raise BindingError(f"{path!r} is no test file below the repository's root")
    names = [name.partition("[")[0] for name in names]
    if len(names) > 2:
        raise BindingError(f"{word!r} nests deeper than FILE::CLASS::TEST")
    return Binding(path, names[0] if len(names) == 2 else None, names[-1] if names else None)


def problem_of(root: Path, binding: Binding) -> tuple[str, str] | None:
    """(rule, message) of what is wrong with a binding by its source; None where nothing is."""
    path = root / binding.path
    if not path.is_file():
        return "BINDING-MISSING", f"there is no {binding.path}"
    try:
        source = parse(path)
    except NoSource as error:
        return "BINDING-MISSING", str(error)
    if binding.name is None:
        tests = [f for name, f in source.functions.items() if name.startswith("test")]
        if source.skipped:
            return "BINDING-SKIPPED", f"{binding.path} does not run: {source.skipped}"
        return None if tests else ("BINDING-MISSING", f"{binding.path} has no test")
    function = find(source, binding.name, binding.class_name)
    if function is None:
        return "BINDING-MISSING", f"{binding.path} has no test {binding.node.partition('::')[2]}"
    skipped = skip_of(source, function, binding.class_name)
    if skipped:
        return "BINDING-SKIPPED", f"{binding.node} does not run: {skipped}"
    if not asserts(source, function):
        return "BINDING-ASSERTS", f"{binding.node} asserts nothing: it cannot fail"
    return None


@dataclass(frozen=True)
class Collected:
    """What pytest collects of some files.

    Attributes:
        nodes: ids of the tests, without their parameters.
        error: why nothing could be collected; empty where it could.
    """

    nodes: frozenset[str]
    error: str = ""

    def has(self, binding: Binding) -> bool:
        """Whether a binding's test is among them, or any test of its file."""
        if binding.name is not None:
            return binding.node in self.nodes
        return any(node.startswith(f"{binding.path}::") for node in self.nodes)


def collect(root: Path, paths: Iterable[str], *, python: Sequence[str] = (sys.executable,)) -> Collected:
    """Asks pytest, in one run, which tests it collects of these files; none of them is run."""
    files = sorted({path for path in paths if (root / path).is_file()})
    if not files:
        return Collected(frozenset())
    command = [*python, "-m", "pytest", "--collect-only", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    try:
        finished = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=COLLECT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Collected(frozenset(), f"pytest cannot be asked: {error}")
    nodes = frozenset(line.partition("[")[0].strip() for line in finished.stdout.splitlines() if "::" in line)
    if finished.returncode in (0, 5):  # 5: no test collected
        return Collected(nodes)
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.startswith(("ERROR", "E  "))]
    return Collected(nodes, f"pytest cannot collect: {' '.join(lines[:3]) or finished.stderr.strip()[-300:]}")
