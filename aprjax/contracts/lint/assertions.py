"""What a test function's source says: whether it asserts anything, and whether it is skipped.

A test that asserts nothing cannot fail, and one that is skipped does not run: a contract bound to either is bound
to nothing. Both are read from the source, without running it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# `pytest.raises(…)` and the like fail where nothing is raised.
_RAISERS = {"raises", "warns", "fail", "deprecated_call"}
# A helper of a helper of a helper: deeper than that nobody sees that a test asserts.
_MOST_HELPERS = 4


@dataclass(frozen=True)
class Source:
    """A parsed test file.

    Attributes:
        path: of the file.
        functions: module-level functions by name.
        classes: module-level classes by name.
        imports: (module, name) by the name that a `from … import …` binds.
        marks: expressions of `pytestmark`.
        skipped: why the whole module is skipped; empty where it is not.
    """

    path: Path
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    marks: tuple[ast.expr, ...] = ()
    skipped: str = ""


class NoSource(Exception):
    """The file is no Python that could be read; the message says why."""


@lru_cache(maxsize=256)
def parse(path: Path) -> Source:
    """The source of a test file.

    Raises:
        NoSource: it cannot be read, or is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
        raise NoSource(f"{path} cannot be read as Python: {error}") from None
    source = Source(path)
    marks: list[ast.expr] = []
    skipped = ""
    for node in tree.body:
        if isinstance(node, _FUNCTIONS):
            source.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            source.classes[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            source.imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign) and any(_is_name(target, "pytestmark") for target in node.targets):
            marks += node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
        elif isinstance(node, ast.Expr) and _calls(node.value, "skip"):
            skipped = "the module skips itself"
    return Source(path, source.functions, source.classes, source.imports, tuple(marks), skipped)


def find(source: Source, name: str, class_name: str | None = None) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """A test function, or a method of a class."""
    if class_name is None:
        return source.functions.get(name)
    owner = source.classes.get(class_name)
    body = [] if owner is None else owner.body
    return next((node for node in body if isinstance(node, _FUNCTIONS) and node.name == name), None)


def asserts(source: Source, function: ast.AST, *, depth: int = 0) -> bool:
    """Whether a function can fail: by an assertion of its own, or of a helper that it calls."""
    called: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not _always_true(node.test):
            return True
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = _called_name(node.func)
            if name.startswith("assert_") or (_of_pytest(node.func) and name in _RAISERS):
                return True
            called.add(name)
    if depth >= _MOST_HELPERS:
        return False
    return any(asserts(owner, helper, depth=depth + 1) for owner, helper in _helpers(source, called, function))


def _helpers(source: Source, names: set[str], caller: ast.AST) -> Iterator[tuple[Source, ast.AST]]:
    """Functions of these names in the file, or in a test helper that it imports from."""
    for name in sorted(names):
        local = source.functions.get(name)
        if local is not None and local is not caller:
            yield source, local
        elif name in source.imports:
            module, original = source.imports[name]
            for path in _module_files(source.path, module):
                try:
                    other = parse(path)
                except NoSource:
                    continue
                if original in other.functions:
                    yield other, other.functions[original]


def _module_files(path: Path, module: str) -> Iterator[Path]:
    """Where pytest's import modes find a helper: beside the test, or in a folder above it."""
    parts = Path(*module.split("."))
    for folder in [path.parent, *path.parent.parents][:4]:
        found = (folder / parts).with_suffix(".py")
        if found.is_file():
            yield found
            return


def _always_true(test: ast.expr) -> bool:
    """`assert True`, `assert 1`, `assert x == x`, `assert (x, "message")`: nothing that could be false."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple):
        return bool(test.elts)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        same = ast.dump(test.left) == ast.dump(test.comparators[0])
        pure = not any(isinstance(node, ast.Call) for node in ast.walk(test))
        return same and pure and isinstance(test.ops[0], ast.Eq | ast.Is | ast.LtE | ast.GtE)
    return False


def skip_of(source: Source, function: ast.AST, class_name: str | None = None) -> str:
    """Why a test would not run; empty where it runs, or runs where its machine can."""
    if source.skipped:
        return source.skipped
    decorators = [*getattr(function, "decorator_list", []), *source.marks]
    owner = source.classes.get(class_name) if class_name is not None else None
    decorators += owner.decorator_list if owner is not None else []
    for decorator in decorators:
        call = decorator if isinstance(decorator, ast.Call) else None
        name = _called_name(call.func if call is not None else decorator)
        if name == "skip":
            return "it is marked skip"
        if name == "xfail":
            return "it is marked xfail: it may fail"
        if name == "skipif" and call is not None and call.args and _constant_true(call.args[0]):
            return "it is marked skipif, and the condition is always true"
    for node in getattr(function, "body", []):
        if isinstance(node, ast.Expr) and _calls(node.value, "skip"):
            return "it skips itself"
        if isinstance(node, ast.Return):
            return "it returns before it asserts anything"
        if isinstance(node, ast.Assert | ast.With | ast.For | ast.If | ast.Try):
            break
    return ""


def _constant_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _called_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _of_pytest(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and _is_name(node.value, "pytest")


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and _of_pytest(node.func) and _called_name(node.func) == name
