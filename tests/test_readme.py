"""README's console blocks are run, and what they show is what comes out.

A block ```console is preceded by `<!-- test: quick -->` or `<!-- test: real -->`. Lines that begin with `$ ` are
commands, the lines below are their output, and `…` stands for any lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- test: (quick|real) -->\n```console\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def commands(kind: str) -> list[tuple[str, list[str]]]:
    """Every command of the blocks of a kind, with the lines that README shows below it."""
    found: list[tuple[str, list[str]]] = []
    for block_kind, text in BLOCK.findall(README):
        if block_kind == kind:
            for line in text.splitlines():
                if line.startswith("$ "):
                    found.append((line[2:], []))
                else:
                    found[-1][1].append(line)
    return found


def assert_shows(output: str, shown: list[str]) -> None:
    pattern = "".join(".*" if line == "…" else re.escape(line.rstrip()) + r"[ ]*\n" for line in shown)
    assert re.fullmatch(pattern, output, flags=re.DOTALL), f"README shows\n{shown}\nbut it printed\n{output}"


def run(command: str, seconds: int) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    outcome = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


def test_every_console_block_is_tested() -> None:
    assert README.count("```console") == len(BLOCK.findall(README))
    assert commands("quick")
    assert commands("real")


@pytest.mark.parametrize(("command", "shown"), commands("quick"), ids=[command for command, _ in commands("quick")])
def test_the_quick_commands(command: str, shown: list[str]) -> None:
    assert_shows(run(command, 60), shown)


@pytest.mark.real_model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("command", "shown"), commands("real"), ids=[command for command, _ in commands("real")])
def test_the_commands_on_real_models(command: str, shown: list[str]) -> None:
    if not (ROOT / ".venv" / "bin" / ".setup-done").exists():
        message = "`make demo` uses .venv, which is not set up: run `make setup`"
        pytest.fail(message) if os.environ.get("APRJAX_REQUIRE_MODELS") == "1" else pytest.skip(message)
    assert_shows(run(command, 1200), shown)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_and_exit_code_is_in_the_readme() -> None:
    from aprjax import cli

    for registered in cli.app.registered_commands:
        assert registered.callback is not None
        assert re.search(rf"^\| `{registered.callback.__name__} ", README, flags=re.MULTILINE), registered.callback
    for code in (0, 1, 2, 3, cli.UNREADABLE):
        assert re.search(rf"^\| {code} \|", README, flags=re.MULTILINE)
    for code in (cli.INTERNAL_ERROR, cli.INTERRUPTED, cli.READER_GONE):
        assert str(code) in README
