"""README's examples are run, and what they show is what comes out: see `console_examples` for how they are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from console_examples import ROOT, Command, Examples, assert_shows, blocks, run_in_shell, written_python

from aprjax.assets import embedded_model

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(kind: str) -> list[Command]:
    """Every command of the console blocks of a kind."""
    return [command for block in blocks(README, kind) for command in block.commands]


def check(command: Command, seconds: int) -> None:
    # In a shell and a process of its own, as a reader runs it, but in the environment that the tests run in, as it is:
    # make would set up another.
    stamp = Path(sys.prefix) / "bin" / ".package-done"
    line = re.sub(r"^make ", f"make -o '{stamp}' VENV='{sys.prefix}' ", command.line)
    code, output = run_in_shell(line, ROOT, seconds=seconds)
    assert code == 0, output
    assert_shows(output, command.shown)


def test_every_console_block_is_tested() -> None:
    assert README.count("```console") == len(blocks(README, "quick")) + len(blocks(README, "real"))
    assert commands("quick")
    assert commands("real")


@pytest.mark.parametrize("command", commands("quick"), ids=lambda command: command.line)
def test_the_quick_commands(command: Command) -> None:
    check(command, 240)  # `make demo` compiles, and tests beside it do, too


@pytest.mark.real_model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", commands("real"), ids=lambda command: command.line)
def test_the_commands_on_real_models(command: Command, model_path: Callable[[str], Path]) -> None:
    model_path("qwen2.5-coder-0.5b")
    check(command, 1200)


def test_the_python_runs(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(embedded_model())
    examples = written_python(README)
    assert examples
    page = Examples(tmp_path)
    for example in examples:
        page.check(example)


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
