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

import gguf
import numpy as np
import pytest

from aprjax import cli
from aprjax.checkpoint.types import CheckpointError
from aprjax.cli import main
from aprjax.trace.capture import EVERYTHING, Capture

ROOT = Path(__file__).resolve().parent.parent
TWO_SIDES = ["layers", "--model", "a.apr", "--ref", "b.gguf"]


@pytest.fixture(autouse=True)
def _no_declared_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers a terminal width; a pipe has none."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def run_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], list[dict[str, Any]]]:
    """Puts a stand-in for the analysis in place; gives the list of the calls that it gets."""

    def install(behave: Callable[[], int]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def stand_in(**options: Any) -> int:
            calls.append(options)
            return behave()

        module = ModuleType("aprjax.bisect.layers.command")
        module.run_layers = stand_in  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "aprjax.bisect.layers.command", module)
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
    defaults |= {"capture": EVERYTHING}
    assert calls == [{"model": "a.apr", "ref": "b.gguf", **nothing, **defaults}]

    calls.clear()
    options = "--wrap twice --arithmetic llama.cpp --positions 3..7 --json - --report r --save-trace t.npz"
    options += " --save-layers 4..6 --save-stages ffn_gate"
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
        "capture": Capture.parse(layers="4..6", stages="ffn_gate"),
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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A complete Qwen2 of one layer with a NaN and, in another tensor, nothing but zeros."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list("abcdefghij"))
    writer.add_token_merges(["a b"])
    shapes = {"token_embd.weight": (10, 8), "output.weight": (10, 8), "output_norm.weight": (8,)}
    shapes |= {f"blk.0.attn_{name}.weight": (width, 8) for name, width in (("q", 8), ("k", 4), ("v", 4), ("output", 8))}
    shapes |= {f"blk.0.attn_{name}.bias": (width,) for name, width in (("q", 8), ("k", 4), ("v", 4))}
    shapes |= {"blk.0.ffn_gate.weight": (16, 8), "blk.0.ffn_up.weight": (16, 8), "blk.0.ffn_down.weight": (8, 16)}
    shapes |= {"blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "blk.0.ffn_up.weight":
            values[3, 2] = np.nan
        writer.add_tensor(name, values * (name != "blk.0.ffn_down.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_inspect_shows_a_file_and_decodes_it_when_asked(tiny: Path, capsys: Any) -> None:
    assert main(["inspect", str(tiny), "--json", "-"]) == 0
    out, error = capsys.readouterr()
    plain = json.loads(out)
    assert error == ""
    assert plain["config"]["hidden_size"] == 8
    assert [(found["id"], found["tensor"]) for found in plain["findings"] if found["severity"] == "error"] == [
        ("values-not-finite", "model.layers.0.mlp.up_proj.weight")
    ]

    assert main(["inspect", str(tiny), "--json", "-", "--values"]) == 0
    decoded = json.loads(capsys.readouterr().out)
    assert [(found["id"], found["tensor"]) for found in decoded["findings"] if found["severity"] == "error"] == [
        ("values-not-finite", "model.layers.0.mlp.up_proj.weight"),
        ("values-all-zero", "model.layers.0.mlp.down_proj.weight"),
    ]


def test_what_is_shown_in_a_pipe_is_not_cut(tiny: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "aprjax", "inspect", str(tiny)]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"model\.layers\.0\.self_attn\.k_proj\.weight .* 4 x 8 .* F32 .* 128 ", outcome.stdout)
    assert outcome.stderr == ""
    assert "\x1b" not in outcome.stdout


def test_json_goes_whole_into_its_file_or_not_at_all(
    tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    assert main(["inspect", str(tiny), "--json", str(target)]) == 0
    assert json.loads(target.read_text())["schema"] == "aprjax.inspection/1"
    assert "model.norm.weight" in capsys.readouterr().out

    assert main(["inspect", str(tiny), "--json", str(tmp_path / "no" / "out.json")]) == 4
    assert "No such file" in capsys.readouterr().err

    # NaN would make the file unreadable for every strict reader: it is our fault, and nothing is written.
    monkeypatch.setattr("aprjax.checkpoint.inspect.Inspection.to_json", lambda inspection: {"ratio": float("nan")})
    assert main(["inspect", str(tiny), "--json", str(tmp_path / "nan.json")]) == cli.INTERNAL_ERROR
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "out.json"}


def test_convert_says_what_it_did_and_leaves_nothing_half_done(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "tiny.apr"
    assert main(["convert", str(tiny), str(target), "--keep-blocks"]) == 0
    out, error = capsys.readouterr()
    assert f"{tiny} (gguf) -> {target} (apr)" in out
    assert error == ""
    assert main(["convert", str(tiny), str(target), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "aprjax.conversion/1"

    tiny.write_bytes(tiny.read_bytes()[:-100])
    before = target.read_bytes()
    assert main(["convert", str(tiny), str(target)]) == 4
    assert main(["convert", str(tiny), str(tmp_path / "other.apr")]) == 4
    assert "error: " in capsys.readouterr().err
    assert target.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "tiny.apr"}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(60)])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_what_is_no_checkpoint_exits_with_4_and_names_the_file(
    tmp_path: Path, capsys: Any, command: str, content: bytes
) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    arguments = [command, str(source)] if command == "inspect" else [command, str(source), str(tmp_path / "out.apr")]
    assert main(arguments) == 4
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"error: {source}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_fetch_prints_the_path_and_nothing_else_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    wanted = tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    monkeypatch.setattr("aprjax.checkpoint.fetch._is_verified", lambda target, model: target == wanted)
    assert main(["fetch", "qwen2.5-coder-0.5b", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{wanted}\n", "")
