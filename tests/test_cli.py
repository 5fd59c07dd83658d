"""The command line: what it passes on, what it prints where, and with which code it exits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aprjax import cli
from aprjax.checkpoint.types import CheckpointError
from aprjax.cli import main

ROOT = Path(__file__).resolve().parent.parent
TWO_SIDES = ["layers", "--model", "a.apr", "--ref", "b.gguf"]


@pytest.fixture
def run_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], list[dict[str, Any]]]:
    """Puts a stand-in for the analysis in place; gives the list of the calls that it gets."""

    def install(behave: Callable[[], int]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def stand_in(**options: Any) -> int:
            calls.append(options)
            return behave()

        module = ModuleType("aprjax.bisect.command")
        module.run_layers = stand_in  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "aprjax.bisect.command", module)
        return calls

    return install


def raises(error: BaseException) -> Callable[[], int]:
    def behave() -> int:
        raise error

    return behave


def spoken(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """stdout, and stderr with the frames and line breaks of a usage error taken out."""
    captured = capsys.readouterr()
    return captured.out, " ".join(re.sub("[│╭╮╰╯─]", " ", captured.err).split())


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
def test_the_verdict_is_the_exit_code(run_layers: Any, code: int) -> None:
    run_layers(lambda: code)
    assert main(TWO_SIDES) == code


def test_layers_passes_every_option_on(run_layers: Any) -> None:
    calls = run_layers(lambda: 0)
    assert main(TWO_SIDES) == 0
    nothing = dict.fromkeys(
        ("prompt", "prompt_file", "tokens", "arithmetic", "model_arithmetic", "ref_arithmetic"), None
    )
    defaults = {"wrap": "none", "positions": "all", "json_out": None, "report": None, "save_trace": None}
    assert calls == [{"model": "a.apr", "ref": "b.gguf", **nothing, **defaults}]

    calls.clear()
    options = "--wrap twice --arithmetic llama.cpp --positions 3..7 --json - --report r --save-trace t.npz"
    assert main([*TWO_SIDES, "--prompt", "What is 2+2?", *options.split()]) == 0
    assert calls[0] == {
        "model": "a.apr",
        "ref": "b.gguf",
        **nothing,
        "prompt": "What is 2+2?",
        "wrap": "twice",
        "arithmetic": "llama.cpp",
        "positions": "3..7",
        "json_out": "-",
        "report": Path("r"),
        "save_trace": Path("t.npz"),
    }

    calls.clear()
    options = "--tokens 3838,374,220 --model-arithmetic float64 --ref-arithmetic float32 --positions last"
    assert main([*TWO_SIDES, *options.split()]) == 0
    assert calls[0]["tokens"] == [3838, 374, 220]
    assert (calls[0]["model_arithmetic"], calls[0]["ref_arithmetic"]) == ("float64", "float32")

    calls.clear()
    assert main([*TWO_SIDES, "--prompt-file", "p.txt"]) == 0
    assert calls[0]["prompt_file"] == Path("p.txt")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], ""),
        (["nonsense"], "nonsense"),
        (["layers"], "--model"),
        (TWO_SIDES[:3], "--ref"),
        ([*TWO_SIDES, "--prompt", "a", "--tokens", "1"], "at most one of"),
        ([*TWO_SIDES, "--prompt", "a", "--prompt-file", "b"], "at most one of"),
        ([*TWO_SIDES, "--tokens", "1,x"], "'1,x'"),
        ([*TWO_SIDES, "--tokens", ""], "token ids"),
        ([*TWO_SIDES, "--tokens", "-1"], "'-1'"),
        ([*TWO_SIDES, "--tokens", "1", "--wrap", "once"], "--wrap goes with text"),
        ([*TWO_SIDES, "--wrap", "thrice"], "thrice"),
        ([*TWO_SIDES, "--positions", "first"], "'first'"),
        ([*TWO_SIDES, "--positions", "5..3"], "'5..3'"),
        ([*TWO_SIDES, "--arithmetic", "abacus"], "'abacus' is unknown; known: float32"),
        ([*TWO_SIDES, "--arithmetic", "float32", "--ref-arithmetic", "float64"], "give --arithmetic, or"),
        (["fetch", "gpt-5"], "known: qwen2.5-coder-0.5b, qwen2.5-coder-1.5b"),
        (["convert", "a.gguf"], "OUT"),
        (["inspect"], "FILE"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_was_wrong(
    run_layers: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    calls = run_layers(lambda: 0)
    assert main(arguments) == 2
    out, error = spoken(capsys)
    assert complaint in error
    # Only the bare command shows its help, on stdout.
    assert not out or not arguments
    assert calls == []


def test_an_unreadable_checkpoint_exits_with_4_and_one_line(run_layers: Any, capsys: Any) -> None:
    fault = CheckpointError("the magic is b'PK'", file="a.apr", offset=0, fix="give a checkpoint")
    run_layers(raises(fault))
    assert main(TWO_SIDES) == 4
    assert capsys.readouterr() == ("", "error: a.apr, offset 0: the magic is b'PK'. Likely fix: give a checkpoint\n")


def test_a_full_disk_exits_with_4(run_layers: Any, capsys: Any) -> None:
    run_layers(raises(OSError(28, "No space left on device", "out.apr")))
    assert main(TWO_SIDES) == 4
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'out.apr'\n"


def test_a_fault_of_our_own_is_never_a_verdict(run_layers: Any, capsys: Any) -> None:
    run_layers(raises(IndexError("list index out of range\nsecond line")))
    assert main(TWO_SIDES) == cli.INTERNAL_ERROR
    assert cli.INTERNAL_ERROR not in range(5)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert "IndexError: list index out of range" in error
    assert "--debug" in error

    assert main(["--debug", *TWO_SIDES]) == cli.INTERNAL_ERROR
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_exits_with_130(run_layers: Any, capsys: Any) -> None:
    run_layers(raises(KeyboardInterrupt()))
    assert main(TWO_SIDES) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["layers", "--help"]])
def test_a_reader_that_goes_away_is_no_divergence(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    outcome = subprocess.run(
        [sys.executable, "-m", "aprjax", *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert outcome.returncode == cli.READER_GONE
    assert outcome.stderr == b""


def test_a_terminal_without_unicode_still_shows_help() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "aprjax", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert outcome.returncode == 0
    assert b"Exit codes: 0 agree" in outcome.stdout


def test_help_is_fast() -> None:
    def cpu_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "aprjax", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # The goal, and about twice what it takes. Processor time, because a busy machine stretches the clock's.
    assert min(cpu_seconds() for _ in range(5)) < 0.3


def test_json_goes_to_stdout_alone_or_whole_into_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    class Inspection:
        def to_json(self) -> dict[str, Any]:
            return {"file": "é.gguf", "bad": bad}

        def __str__(self) -> str:
            return "a table"

    module = ModuleType("aprjax.checkpoint.inspect")
    module.inspect = lambda file, *, values: Inspection()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aprjax.checkpoint.inspect", module)

    bad: float | None = None
    assert main(["inspect", "x.gguf", "--json", "-"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out) == {"file": "é.gguf", "bad": None}
    assert error == ""

    target = tmp_path / "out.json"
    assert main(["inspect", "x.gguf", "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == {"file": "é.gguf", "bad": None}
    assert capsys.readouterr().out == "a table\n"

    # NaN would make the file unreadable for every strict reader: it is our fault, and nothing is written.
    bad = float("nan")
    target.unlink()
    assert main(["inspect", "x.gguf", "--json", str(target)]) == cli.INTERNAL_ERROR
    assert list(tmp_path.iterdir()) == []

    bad = None
    assert main(["inspect", "x.gguf", "--json", str(tmp_path / "no" / "folder.json")]) == 4
    assert "No such file" in capsys.readouterr().err
