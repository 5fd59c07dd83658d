"""The rules of docs/architecture.md that a machine can hold: one-way imports, small files, a fast start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "aprjax").rglob("*.py"), *(ROOT / "bisect").rglob("*.py")])
# One job a file: what needs more lines has two. Exceptions are listed with their reason.
MOST_LINES = 400
LONGER_FILES: dict[str, str] = {}
HEAVY = {"jax", "jaxlib", "flax", "matplotlib", "pandas", "scipy", "torch", "transformers", "llama_cpp"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def order_of_packages() -> list[str]:
    """The packages in the order of the document's table: each imports only from those before it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `aprjax/(\w+)/` \|", text, flags=re.MULTILINE)


def package_of(module: str) -> str | None:
    """`aprjax.blocks.codec` → `blocks`; the top level of aprjax itself → `""`; other modules → None."""
    parts = module.split(".")
    if parts[0] != "aprjax":
        return None
    folder = ROOT.joinpath(*parts[:2])
    return parts[1] if len(parts) > 1 and folder.is_dir() else ""


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    here = list(path.relative_to(ROOT).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from aprjax import blocks` imports the package, too; the version is a constant that imports nothing.
            names = [alias.name for alias in node.names if (module, alias.name) != ("aprjax", "__version__")]
            found.update(f"{module}.{name}" if module == "aprjax" else module for name in names)
    return found


def test_the_document_names_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "aprjax").glob("*/__init__.py")}
    assert packages <= set(order_of_packages())
    assert len(order_of_packages()) >= 5


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    order = order_of_packages()
    package = path.relative_to(ROOT).parts[1] if path.parent != ROOT / "aprjax" else ""
    if package not in order:
        return  # the command line and the front door stand after all packages
    allowed = set(order[: order.index(package) + 1])
    for module in imported_modules(path):
        imported = package_of(module)
        assert imported is None or imported in allowed, (
            f"{relative(path)} imports {module}: {package} may import from {sorted(allowed)} only"
        )


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=relative)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if relative(path) in LONGER_FILES:
        assert lines >= MOST_LINES, "short enough now: take it off the list"
    else:
        assert lines < MOST_LINES


def imported_by(code: str) -> set[str]:
    """The top-level modules that are there after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    outcome = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(outcome.stdout.split())


@pytest.mark.parametrize("module", ["aprjax.checkpoint", "aprjax.blocks", "aprjax.text", "aprjax.contracts"])
def test_the_packages_for_files_and_text_import_nothing_heavy(module: str) -> None:
    assert imported_by(f"import {module}") & HEAVY == set()


def test_the_top_level_and_the_command_line_do_not_even_import_numpy() -> None:
    assert imported_by("import aprjax, aprjax.cli") & (HEAVY | {"numpy", "rich"}) == set()


def test_the_top_level_has_its_names() -> None:
    import aprjax
    from aprjax.checkpoint import open_checkpoint

    assert aprjax.open is open_checkpoint
    assert set(aprjax.__all__) <= set(dir(aprjax))
    for name in aprjax.__all__:
        assert getattr(aprjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aprjax.nothing  # noqa: B018


def tracked_texts() -> dict[str, str]:
    """The text files of the repository, those that were not added yet included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    texts = {}
    for name in filter(None, listed):
        path = ROOT / name
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
    return texts


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    folders = "|".join(("home", "root", "work", "tmp", "Users"))
    machine_path = re.compile(rf"(?<![\w.}}/:~*])/(?:{folders})/\w+")
    found = [f"{name}: {match[0]}" for name, text in tracked_texts().items() for match in machine_path.finditer(text)]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_global_switch_to_double_precision(path: Path) -> None:
    # It would change the arithmetic of every other computation in the process: it is scoped instead.
    assert not re.search(r"config\.update\(\s*[\"']jax_enable_x64", path.read_text(encoding="utf-8"))
