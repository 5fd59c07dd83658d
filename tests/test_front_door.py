"""`python -m bisect` is the toolkit wherever aprjax is installed; in other processes it is the standard module."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.front_door import runs_bisect

ROOT = Path(__file__).resolve().parent.parent
STANDARD_MODULE = Path(os.__file__).with_name("bisect.py")
PUBLIC = {"bisect", "bisect_left", "bisect_right", "insort", "insort_left", "insort_right"}


def load(path: Path) -> ModuleType:
    """The module at `path`, under a name of its own."""
    spec = importlib.util.spec_from_file_location("module_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names(module: ModuleType) -> set[str]:
    return {name for name in dir(module) if not name.startswith("__")}


# --- The names -------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_standard_module() -> None:
    ours, standard = load(ROOT / "bisect" / "__init__.py"), load(STANDARD_MODULE)
    assert public_names(ours) == public_names(standard) == PUBLIC
    for name in PUBLIC:
        # The same C functions, not copies: pickles and identity tests hold.
        assert getattr(ours, name) is getattr(standard, name)


def test_without_the_c_module_the_functions_come_from_the_standard_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_bisect", None)
    ours, standard = load(ROOT / "bisect" / "__init__.py"), load(STANDARD_MODULE)
    assert public_names(ours) == public_names(standard) == PUBLIC
    for name in PUBLIC:
        assert getattr(ours, name).__code__ == getattr(standard, name).__code__
    assert ours.bisect is ours.bisect_right
    assert ours.insort is ours.insort_right


@given(values=st.lists(st.integers(-5, 5)), new=st.integers(-6, 6), negated=st.booleans())
def test_they_behave_like_the_definition(values: list[int], new: int, negated: bool) -> None:
    ours = load(ROOT / "bisect" / "__init__.py")
    # With `key`, the position functions take a key and the insertion functions an item.
    key: Callable[[int], int] | None = (lambda item: -item) if negated else None
    values.sort(key=key)
    keys = [key(item) if key else item for item in values]
    wanted = key(new) if key else new
    left, right = sum(item < wanted for item in keys), sum(item <= wanted for item in keys)
    assert ours.bisect_left(values, wanted, key=key) == left
    assert ours.bisect_right(values, wanted, key=key) == ours.bisect(values, wanted, key=key) == right
    for insort, position in ((ours.insort_left, left), (ours.insort_right, right), (ours.insort, right)):
        grown = list(values)
        insort(grown, new, key=key)
        assert grown == [*values[:position], new, *values[position:]]


def test_modules_that_import_bisect_work_from_the_root() -> None:
    code = (
        "import bisect, random, statistics, numpy.random, jax; "
        "assert bisect.__path__; print(statistics.mean(random.choices([7], k=3)), jax.numpy.ones(2).sum())"
    )
    outcome = run(sys.executable, "-c", code, cwd=ROOT)
    assert outcome.stdout.split() == ["7", "2.0"], outcome.stderr


# --- The command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "arguments", "expected"),
    [
        (["python", "-m", "bisect"], ["-m"], True),
        (["python", "-m", "bisect", "layers", "--model", "a"], ["-m", "layers", "--model", "a"], True),
        (["python", "-P", "-X", "dev", "-m", "bisect", "-m"], ["-m", "-m"], True),
        (["python", "-mbisect"], ["-m"], True),
        (["python", "-IBmbisect", "x"], ["-m", "x"], True),
        (["python", "-Wignore", "-m", "bisect"], ["-m"], True),
        (["python", "-m", "pytest", "bisect"], ["-m", "bisect"], False),
        (["python", "-m", "pytest", "-m", "bisect"], ["-m", "-m", "bisect"], False),
        (["python", "-mmbisect"], ["-m"], False),
        (["python", "-m", "git.bisect"], ["-m"], False),
        (["python", "bisect"], ["bisect"], False),
        (["python", "script.py", "-m", "bisect"], ["script.py", "-m", "bisect"], False),
        (["python", "-c", "pass", "-m", "bisect"], ["-c", "-m", "bisect"], False),
        (["python"], [""], False),
        ([], [], False),
    ],
)
def test_which_command_lines_are_guarded(original: list[str], arguments: list[str], expected: bool) -> None:
    assert runs_bisect(original, arguments) is expected


# --- Installations ---------------------------------------------------------------------------------------


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user's shell would: with none of this process's own Python settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@dataclass(frozen=True)
class Installation:
    """A virtual environment with aprjax in it, and the dependencies of this environment behind it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """What `pip install aprjax` and `pip install --editable .` leave behind, installed by pip itself."""
    folder = tmp_path_factory.mktemp(request.param)
    # What pip asks the build backend for, without an isolated environment that would need a network.
    build = f"from hatchling.build import build_{request.param} as build; print(build({str(folder)!r}))"
    built = run(sys.executable, "-c", build, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    wheel = folder / built.stdout.split()[-1]
    installed = Installation(folder / "venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", installed.folder, cwd=folder).returncode == 0
    pip = [sys.executable, "-m", "pip", "--python", installed.python, "install", "--quiet", "--no-deps", "--no-index"]
    outcome = run(*pip, wheel, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (installed.site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return installed


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that has nothing to do with aprjax."""
    return tmp_path


def is_the_toolkit(outcome: subprocess.CompletedProcess[str]) -> bool:
    return outcome.returncode == 0 and outcome.stdout.startswith("aprjax ") and outcome.stderr == ""


@pytest.mark.parametrize("options", [["-m"], ["-P", "-m"], ["-I", "-m"], ["-Im"], ["-B", "-W", "error", "-m"]])
def test_from_any_folder_it_is_the_toolkit(installation: Installation, elsewhere: Path, options: list[str]) -> None:
    for folder in (elsewhere, ROOT):
        outcome = run(installation.python, *options, "bisect", "--version", cwd=folder)
        assert is_the_toolkit(outcome), outcome
    joined = run(installation.python, *options[:-1], f"{options[-1]}bisect", "--version", cwd=elsewhere)
    assert is_the_toolkit(joined), joined


def test_with_a_safe_path_it_is_the_toolkit(installation: Installation, elsewhere: Path) -> None:
    for folder in (elsewhere, ROOT):
        outcome = run(installation.python, "-m", "bisect", "--version", cwd=folder, PYTHONSAFEPATH="1")
        assert is_the_toolkit(outcome), outcome


def test_all_three_names_are_the_same_program(installation: Installation, elsewhere: Path) -> None:
    commands = {
        "python -m bisect": [installation.python, "-m", "bisect"],
        "python -m aprjax": [installation.python, "-m", "aprjax"],
        "aprjax": [installation.folder / "bin" / "aprjax"],
    }
    pages = {name: run(*command, "layers", "--help", cwd=elsewhere) for name, command in commands.items()}
    assert all(page.returncode == 0 for page in pages.values()), pages
    texts = {" ".join(page.stdout.replace(f"{name} layers", "PROGRAM layers").split()) for name, page in pages.items()}
    assert len(texts) == 1, texts
    assert "PROGRAM layers" in texts.pop()


@pytest.mark.parametrize("hook", ["aaa.pth", "zzz.pth", "sitecustomize.py"])
def test_a_start_up_hook_that_imports_bisect_changes_nothing(
    installation: Installation, elsewhere: Path, hook: str
) -> None:
    planted = installation.site_packages / hook
    planted.write_text("import bisect, random\n")
    try:
        guarded = run(installation.python, "-m", "bisect", "--version", cwd=elsewhere)
        other = run(installation.python, "-c", "import bisect; print(bisect.__file__)", cwd=elsewhere)
    finally:
        planted.unlink()
    assert is_the_toolkit(guarded), guarded
    assert Path(other.stdout.strip()) == STANDARD_MODULE


PROBE = """
import sys
assert "bisect" not in sys.modules
finders = [type(finder).__name__ for finder in sys.meta_path]
assert "FrontDoor" not in finders, finders
import bisect
print(bisect.__file__)
"""


def test_no_other_process_notices(installation: Installation, elsewhere: Path) -> None:
    (elsewhere / "probe.py").write_text(PROBE)
    for command in (["-c", PROBE], ["-c", PROBE, "-m", "bisect"], ["probe.py", "bisect"], ["-m", "probe"]):
        outcome = run(installation.python, *command, cwd=elsewhere)
        assert Path(outcome.stdout.strip()) == STANDARD_MODULE, outcome
    imported = "import sys; print('_aprjax_front_door' in sys.modules, any('aprjax' in name for name in sys.modules))"
    assert run(installation.python, "-c", imported, cwd=elsewhere).stdout.split() == ["False", "False"]


def test_processes_that_it_starts_do_not_notice(installation: Installation, elsewhere: Path) -> None:
    # `fetch` runs pip, which imports the standard module.
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {PROBE!r}]))"
    (installation.site_packages / "child.pth").write_text(
        "import sys; '--start-child' in sys.argv and exec(" + repr(code) + ")\n"
    )
    try:
        outcome = run(installation.python, "-m", "bisect", "--start-child", cwd=elsewhere)
    finally:
        (installation.site_packages / "child.pth").unlink()
    assert Path(outcome.stdout.strip()) == STANDARD_MODULE, outcome


def test_the_installation_leaves_nothing_that_pip_would_not_remove(installation: Installation) -> None:
    record = next(installation.site_packages.glob("aprjax-*.dist-info/RECORD"))
    with record.open(newline="") as lines:
        listed = {line[0] for line in csv.reader(lines)}
    assert {"_aprjax_front_door.py", "aprjax_front_door.pth"} <= listed
    # `.pth` files run in alphabetical order: the folder of an editable installation must come first.
    editable = [name for name in listed if name.endswith(".pth") and name != "aprjax_front_door.pth"]
    assert all(name < "aprjax_front_door.pth" for name in editable)


@pytest.mark.parametrize("installation", ["editable"], indirect=True)
def test_an_editable_folder_that_was_moved_is_an_error_not_silence(installation: Installation, elsewhere: Path) -> None:
    lines = installation.site_packages / "_aprjax.pth"
    original = lines.read_text()
    lines.write_text(str(elsewhere / "gone"))
    try:
        outcome = run(installation.python, "-m", "bisect", "--version", cwd=elsewhere)
    finally:
        lines.write_text(original)
    assert outcome.returncode == 4
    assert "install aprjax again" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("installation", ["wheel"], indirect=True)
def test_the_wheel_holds_every_file_of_the_packages(installation: Installation) -> None:
    wheel = next(installation.folder.parent.glob("*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("aprjax/", "bisect/"))}
    sources = {path for package in ("aprjax", "bisect") for path in (ROOT / package).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in sources if path.suffix not in (".pyc", ".swp")}
    assert packed == expected - {"aprjax/front_door.py", "aprjax/front_door.pth"}
