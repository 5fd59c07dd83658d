"""The examples in README and docs: found, run, and held to what the page shows.

A block ```console or ```python is preceded by `<!-- test: KIND -->`. In a console block lines that begin with `$ ` are
commands, which a backslash continues on the next line, and the lines below are their output, stdout and stderr as a
terminal of 80 columns would show them. `…` alone on a line stands for any lines. A command succeeds unless `$ echo $?`
follows, which shows another exit code.

    python tests/console_examples.py docs/commands/files.md

runs a page's examples and writes what they show now in the place of what the page shows; what was left out stays so.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("quick", "thorough", "real")
ANY_LINES = "…"
COLUMNS = "80"
BLOCK = re.compile(r"<!-- test: (?P<kind>\w+) -->\n```(?P<language>console|python)\n(?P<text>.*?)^```$", re.S | re.M)
# What a shell would do more than start a program.
_SHELL = re.compile(r"[|&;<>*`(){}$]")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_FRONT_DOORS = (["python", "-m", "bisect"], ["python", "-m", "aprjax"], ["aprjax"])

_FLOAT = re.compile(r"(?<![\w.])[-+−]?(?:\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?![\w]|\.\d)")
# Sums are added in another order on another processor: what lies below is rounding itself, what lies beyond is a
# multiple of it (so many sigma), and only their order of magnitude is the same. Other numbers are printed with two
# digits or more, of which the last may differ.
ROUNDING = 1e-5
BEYOND = 1e4
RELATIVE = 0.02
# Nobody's machine is as fast as another's.
_DURATION = re.compile(r"\b\d+(?:\.\d+)?(?= ?(?:s|ms|min|seconds|tokens/s)\b)")


@dataclass(frozen=True)
class Command:
    """A command as it is written, and the lines that the page shows below it."""

    written: str
    shown: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The command on one line."""
        return re.sub(r"\s*\\\n\s*", " ", self.written)


@dataclass(frozen=True)
class Block:
    """An example: a console's commands, or Python."""

    kind: str
    language: str
    text: str

    @property
    def commands(self) -> list[Command]:
        """The commands of a console block.

        Raises:
            ValueError: it begins with output.
        """
        found: list[Command] = []
        for line in re.split(r"(?<!\\)\n", self.text.rstrip("\n")):
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            elif found:
                found[-1].shown.append(line)
            else:
                raise ValueError(f"output without a command: {line!r}")
        return found


def blocks(markdown: str, kind: str | None = None) -> list[Block]:
    """The examples of a page, of one kind or all."""
    found = [Block(match["kind"], match["language"], match["text"]) for match in BLOCK.finditer(markdown)]
    return [block for block in found if kind in (None, block.kind)]


def written_python(markdown: str) -> list[Block]:
    """Every Python block of a page, whether it says what kind of example it is or not."""
    found = re.findall(r"^```python\n(.*?)^```$", markdown, re.S | re.M)
    return [Block("quick", "python", text) for text in found]


def untested(markdown: str) -> int:
    """How many blocks are no examples that a test runs."""
    written = len(re.findall(r"^```(?:console|python)$", markdown, re.M))
    return written - sum(block.kind in KINDS for block in blocks(markdown))


# What is shown and what came out


def assert_shows(output: str, shown: Sequence[str]) -> None:
    """Fails where the output is not what is shown."""
    lines, parts = output.rstrip().splitlines(), _parts("\n".join(shown).rstrip().splitlines())
    matches = _positions(lines, parts)
    assert matches is not None, "\n".join(["shown is", *shown, "but printed was", *lines])


def _parts(shown: Sequence[str]) -> list[list[str]]:
    """The lines between those that stand for any lines."""
    parts: list[list[str]] = [[]]
    for line in shown:
        if line == ANY_LINES:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


def _positions(lines: list[str], parts: list[list[str]]) -> list[int] | None:
    """Where each part lies in the output, in order, the first at its start and the last at its end."""
    at, found = 0, []
    for number, part in enumerate(parts):
        last = len(lines) - len(part)
        first = last if number == len(parts) - 1 and number else at
        ends = at if number == 0 else last
        if len(parts) == 1 and len(part) != len(lines):
            return None
        place = next((p for p in range(max(first, at), ends + 1) if _alike(lines[p : p + len(part)], part)), None)
        if place is None:
            return None
        found.append(place)
        at = place + len(part)
    return found


def _alike(lines: Sequence[str], shown: Sequence[str]) -> bool:
    return len(lines) == len(shown) and all(map(line_agrees, lines, shown))


def line_agrees(printed: str, shown: str) -> bool:
    """Whether two lines say the same: words and integers as they are, other numbers within rounding, times never."""
    printed, shown = (_DURATION.sub("#", line) for line in (printed, shown))
    texts = [_FLOAT.sub("#", line).split() for line in (printed, shown)]
    if texts[0] != texts[1]:
        return False
    return all(map(number_agrees, _FLOAT.findall(printed), _FLOAT.findall(shown)))


def number_agrees(printed: str, shown: str) -> bool:
    """Whether two numbers are the same but for rounding, and for the last digit that is shown."""
    one, other = (float(number.replace("−", "-")) for number in (printed, shown))
    small, large = sorted((abs(one), abs(other)))
    if small < ROUNDING or large > BEYOND:
        return large < (10 * small or ROUNDING)
    mantissa, _, exponent = shown.partition("e")
    digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(one - other) <= max(RELATIVE * abs(other), 1.01 * digit)


# Running


class Examples:
    """Runs the examples of one page, in order, in one folder and one namespace.

    aprjax's own commands run in this process: a new one would load jax and compile every program again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.code = 0

    def check(self, block: Block) -> None:
        """Runs a block; fails where a command shows something else, or fails without a word about it."""
        if block.language == "python":
            with contextlib.chdir(self.folder):
                exec(compile(block.text, "<example>", "exec"), self.namespace)
            return
        for command, output in self.outputs(block):
            assert_shows(output, command.shown)

    def outputs(self, block: Block) -> Iterator[tuple[Command, str]]:
        """Each command of a console block, with what it printed."""
        for command, following in zip(block.commands, [*block.commands[1:], None], strict=True):
            output = self.run(command.line)
            explained = following is not None and following.line == "echo $?"
            assert explained or self.code == 0, f"exit code {self.code} of `{command.line}`:\n{output}"
            yield command, output

    def run(self, line: str) -> str:
        """What a command line prints; `code` is its exit code."""
        if line == "echo $?":
            shown, self.code = f"{self.code}\n", 0
            return shown
        words = shlex.split(line)
        door = next((door for door in _FRONT_DOORS if words[: len(door)] == door), None)
        if door is None or _SHELL.search(_QUOTED.sub("", line)):
            return self._run_in_shell(line)
        from aprjax.cli import main

        stream = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            _environment(COLUMNS=COLUMNS),
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            self.code = main(words[len(door) :])
        return stream.getvalue()

    def _run_in_shell(self, line: str) -> str:
        self.code, output = run_in_shell(line, self.folder)
        return output


def run_in_shell(line: str, folder: Path, *, seconds: int = 600) -> tuple[int, str]:
    """A command line's exit code, and what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outcome = subprocess.run(
        line,
        shell=True,
        cwd=folder,
        # The tree itself, also where no installation leads to it.
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": COLUMNS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
    )
    return outcome.returncode, outcome.stdout


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Writing the outputs anew


def renewed(shown: Sequence[str], output: str) -> list[str]:
    """The output, with those lines left out that the page leaves out: found by their likeness, whatever the numbers."""
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    if ANY_LINES not in shown:
        return lines
    kept = _aligned([line for line in shown if line != ANY_LINES], lines)
    new, before = [], -1
    for number in [*kept, len(lines)]:
        if number > before + 1:
            new.append(ANY_LINES)
        new += lines[number : number + 1]
        before = number
    return new


def _aligned(shown: Sequence[str], lines: Sequence[str]) -> list[int]:
    """Those lines, in order, that are most like the ones shown."""
    from difflib import SequenceMatcher

    def masked(line: str) -> str:
        return _FLOAT.sub("#", " ".join(line.split()))

    # best[i][j]: the likeness of the first i shown to the first j printed, and which were chosen.
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] * (len(lines) + 1) for _ in range(len(shown) + 1)]
    for i, wanted in enumerate(map(masked, shown), 1):
        for j, line in enumerate(map(masked, lines), 1):
            likeness = SequenceMatcher(None, wanted, line, autojunk=False).ratio()
            score, chosen = best[i - 1][j - 1]
            taken = (score + likeness, (*chosen, j - 1)) if likeness > 0.6 else (0.0, ())
            best[i][j] = max(best[i - 1][j], best[i][j - 1], taken, key=lambda found: found[0])
    return list(best[-1][-1][1])


def renew(markdown: str, examples: Examples, kinds: Sequence[str]) -> str:
    """The page with the outputs of its examples of these kinds as they are now."""

    def block(match: re.Match[str]) -> str:
        found = Block(match["kind"], match["language"], match["text"])
        if found.kind not in kinds:
            return match[0]
        if found.language == "python":
            examples.check(found)
            return match[0]
        new = [
            line
            for command, output in examples.outputs(found)
            for line in (f"$ {command.written}", *renewed(command.shown, output))
        ]
        return match[0].replace(found.text, "\n".join(new) + "\n")

    return BLOCK.sub(block, markdown)
