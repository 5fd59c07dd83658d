"""`python -m aprjax trace`: what it shows and saves, and how a wrong command line or file ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_checkpoint, write_tiny
from trace_samples import TOKENS, assert_same_values, sample

from aprjax.cli import main
from aprjax.text import Tokenizer
from aprjax.text import wrap as wrap_chat
from aprjax.trace import Trace, save
from aprjax.trace.aprt import open_aprt


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(sample(), tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def summary_of(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["trace", *arguments, "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_a_checkpoint_is_run_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = write_tiny(tmp_path / "model.apr", tiny_checkpoint())
    target = tmp_path / "out.safetensors"
    asked = ["--prompt", "if a < b:", "--wrap", "once", "--arithmetic", "float32", "--save", str(target)]
    summary = summary_of(capsys, str(tmp_path / "model.apr"), *asked)
    ids = Tokenizer.from_checkpoint(checkpoint).encode(wrap_chat("if a < b:", "once"))
    trace = Trace.load(target)
    assert summary["tokens"] == list(trace.info.tokens) == ids
    assert (summary["side"]["kind"], summary["side"]["arithmetic"]) == ("checkpoint", "float32")
    assert summary["side"]["sha256"] == trace.info.sha256 == checkpoint.sha256()
    assert len(summary["values"]) == len(trace) == 3 + 17 * 3
    assert summary["absent"] == []


def test_a_saved_trace_becomes_an_aprt_folder_and_returns(saved: Path, capsys: pytest.CaptureFixture) -> None:
    folder, back = saved.with_name("aprt"), saved.with_name("back.safetensors")
    summary = summary_of(capsys, str(saved), "--save", str(folder))
    assert summary["left_out"] == ["the engine's own nodes have no place in the format"]
    summary_of(capsys, str(folder), "--tokens", ",".join(str(token) for token in TOKENS), "--save", str(back))
    assert_same_values(Trace.load(back), open_aprt(folder))


def test_the_summary_counts_what_is_not_finite(saved: Path, capsys: pytest.CaptureFixture) -> None:
    summary = summary_of(capsys, str(saved))
    assert summary["schema"] == "aprjax.trace-summary/1"
    for value in summary["values"]:
        assert (value["nan"], value["inf"]) == (1, 2)
        assert value["max_abs"] == pytest.approx(3.4028235e38)


def test_the_table_for_people(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", str(saved), "--save", str(saved.with_name("aprt"))]) == 0
    shown = capsys.readouterr().out
    for words in ("model.gguf", "threads: 2", "tokens: 5", "not saved: the engine's own nodes", "saved: "):
        assert words in shown


def test_a_folder_of_upstreams_needs_file_and_tokens(saved: Path, capsys: pytest.CaptureFixture) -> None:
    folder = saved.with_name("aprt")
    assert main(["trace", str(saved), "--save", str(folder)]) == 0
    (folder / "_aprjax.json").unlink()
    assert main(["trace", str(folder)]) == 4
    assert "--tokens" in capsys.readouterr().err
    checkpoint = write_tiny(saved.with_name("model.apr"), tiny_checkpoint())
    told = ["--tokens", "3,1,4,1,5", "--file", str(saved.with_name("model.apr"))]
    summary = summary_of(capsys, str(folder), *told)
    # The sample is of no such model: nothing is taken, and each file has its reason.
    assert summary["values"] == []
    assert summary["side"]["sha256"] == checkpoint.sha256()
    assert "as told on the command line" in summary["side"]["engine"]["file and tokens"]
    assert len(summary["unvouched"]) == 37
    assert main(["trace", str(folder), *told]) == 0
    assert "not taken: layer-0/ffn_gate.bin: expected 5 x 512 elements, found 40" in capsys.readouterr().out


USAGE = {
    "a model without tokens": ["MODEL"],
    "two prompts": ["MODEL", "--prompt", "a", "--tokens", "1"],
    "wrapped tokens": ["MODEL", "--tokens", "1", "--wrap", "once"],
    "tokens that are none": ["MODEL", "--tokens", "a"],
    "an unknown arithmetic": ["MODEL", "--tokens", "1", "--arithmetic", "float8"],
    "no side": [],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE.keys())
def test_a_wrong_command_line_is_usage(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    write_tiny(tmp_path / "model.apr", tiny_checkpoint())
    assert main(["trace", *(a.replace("MODEL", str(tmp_path / "model.apr")) for a in arguments)]) == 2
    assert capsys.readouterr().out == ""


def test_a_failure_is_one_line_and_leaves_nothing(saved: Path, capsys: pytest.CaptureFixture) -> None:
    (saved.with_name("prompt")).write_bytes(b"\xff")
    (saved.with_name("full")).mkdir()
    (saved.with_name("full") / "something").write_text("here")
    write_tiny(saved.with_name("model.apr"), tiny_checkpoint())
    wrong = {
        "is to be compared": ["--tokens", "1,2"],
        "recorded trace has its tokens": ["--prompt", "hello"],
        "not UTF-8": ["--prompt-file", str(saved.with_name("prompt"))],
        "not an empty folder": ["--save", str(saved.with_name("full"))],
        "No such file": ["--save", str(saved.with_name("missing") / "a.safetensors")],
        "has its own": ["--arithmetic", "float32"],
        "was made from a file with sha256 000000": ["--file", str(saved.with_name("model.apr"))],
    }
    before = sorted(saved.parent.rglob("*"))
    for words, options in wrong.items():
        assert main(["trace", str(saved), *options]) == 4, words
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1
        assert words in shown.err
    assert sorted(saved.parent.rglob("*")) == before
