"""`generate` on tiny models: our side's decoding, its one pass, and the command from the outside."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from generating import Noise
from tiny import CONFIG, VOCABULARY, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.generate import command as generate_command
from aprjax.bisect.generate.sides import LocalGenerator
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import Checkpoint
from aprjax.cli import main
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.qwen2.generate import generate_greedy
from aprjax.qwen2.model import Qwen2
from aprjax.trace import TraceInfo, TraceWriter
from aprjax.trace.generation import Stop

FLOAT32 = PRESETS["float32"]
PROMPT = (5, 17, 40, 5, 90)
NEW = 6
ONE_LAYER = replace(CONFIG, num_layers=1)
HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test fills the user's cache of compiled programs."""
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny_checkpoint(ONE_LAYER)


def test_a_pass_over_the_continuation_says_what_decoding_says(checkpoint: Checkpoint) -> None:
    side = LocalGenerator(checkpoint, FLOAT32)
    run = side.generate(PROMPT, NEW, ignore_stop=True)
    assert list(run.tokens) == generate_greedy(Qwen2(checkpoint, FLOAT32), list(PROMPT), max_new_tokens=NEW)
    assert run.likeliest.best == list(run.tokens)
    assert (run.passes.batched, run.passes.steps, run.passes.tokens) == (1, NEW - 1, len(PROMPT) + NEW - 1)
    assert run.stop is Stop.BUDGET
    scored = LocalGenerator(checkpoint, FLOAT32).score(PROMPT, run.tokens)
    assert scored.first_difference(run.tokens) is None
    assert (scored.passes.batched, scored.passes.steps, scored.passes.tokens) == (1, 0, len(PROMPT) + NEW - 1)
    assert set(scored.ranks) == {1}
    # Float32 sums in another order; logits are of the size of one.
    assert np.abs(scored.likeliest.logits - run.likeliest.logits).max() < 1e-5
    other = (*run.tokens[:3], (run.tokens[3] + 1) % 100, *run.tokens[4:])
    assert LocalGenerator(checkpoint, FLOAT32).score(PROMPT, other).first_difference(other) == 3


def test_decoding_goes_on_from_what_was_verified(checkpoint: Checkpoint) -> None:
    side = LocalGenerator(checkpoint, FLOAT32)
    run = side.generate(PROMPT, NEW, ignore_stop=True)
    side.score(PROMPT, run.tokens)
    more = side.generate((*PROMPT, *run.tokens[:3], 7), 2, ignore_stop=True)
    assert (more.passes.batched, more.passes.steps, more.passes.tokens) == (0, 2, 2)
    side.forget()
    afresh = side.generate((*PROMPT, *run.tokens[:3], 7), 2, ignore_stop=True)
    assert afresh.passes.batched == 1
    assert afresh.tokens == more.tokens


def test_a_stop_token_ends_it_and_is_part_of_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    side = LocalGenerator(checkpoint, FLOAT32)
    tokens = side.generate(PROMPT, NEW, ignore_stop=True).tokens
    assert VOCABULARY.eos_token_id in side.stop_ids
    third = tokens[2]
    monkeypatch.setattr(LocalGenerator, "stop_ids", frozenset((third,)))
    run = side.generate(PROMPT, NEW, ignore_stop=False)
    assert run.tokens == tokens[: tokens.index(third) + 1]
    assert run.stop is Stop.TOKEN
    assert side.generate(PROMPT, NEW, ignore_stop=True).tokens == tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model whose head prefers token 90 by far, and its reference."""
    folder = tmp_path_factory.mktemp("pair")
    reference = tiny_checkpoint(ONE_LAYER)
    head = reference.tensors[HEAD].decode().copy()
    head[90] *= 30
    write_tiny(folder / "ref.apr", reference)
    write_tiny(folder / "model.apr", with_tensor(reference, HEAD, head))
    return str(folder / "model.apr"), str(folder / "ref.apr")


def run(model: str, ref: str, *options: str) -> int:
    return main(["generate", "--model", model, "--ref", ref, "--max-new-tokens", str(NEW), *options])


def test_the_same_file_twice_is_computed_once(pair: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    assert run(pair[1], pair[1], "--tokens", "5,17,40,5,90", "--arithmetic", "float32", "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "agree"
    assert document["shared"].startswith("the same bytes")
    assert document["continuations"]["model"]["passes"]["tokens"] == 0
    assert document["continuations"]["ref"]["passes"]["batched"] == 1
    assert document["noise"] is None


def test_a_planted_fault_is_found_and_reported(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Noise(1e-4)
    monkeypatch.setattr(generate_command, "measure_logit_noise", lambda a, b, fed, at, **_: noise(fed, at))
    out, folder = tmp_path / "out.json", tmp_path / "report"
    options = ("--tokens", "5,17,40,5,90", "--arithmetic", "float32", "--json", str(out), "--report", str(folder))
    assert run(*pair, *options) == 1
    document = json.loads(out.read_text())
    first = document["first_difference"]
    assert document["verdict"] == "divergence"
    assert first["model"]["margin"]["top1"] == 90
    assert first["step"] == document["common_tokens"]
    assert first["gap_in_sigmas"] == pytest.approx(first["gap"] / 1e-4)
    printed = capsys.readouterr()
    assert f"DIVERGENCE at new token {first['step'] + 1}" in printed.out
    assert "1 batched pass" in printed.out
    assert "report: " in printed.err
    kept = json.loads((folder / "generate.json").read_text())
    assert kept.pop("made")["aprjax"]
    assert kept == document
    assert f"new token {first['step'] + 1}" in (folder / "index.html").read_text(encoding="utf-8")
    assert (folder / "generate-tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokens", "5,17", "--max-new-tokens", "511"), "ask for --max-new-tokens 510 or fewer"),
        (("--tokens", ",".join(["5"] * 512)), "shorten the prompt"),
        (("--tokens", "5,99999"), "token ids from 0 to"),
        (("--prompt", ""), "no tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_words(
    pair: tuple[str, str], options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(*pair, *options) == 4
    assert said in capsys.readouterr().err


def test_sides_that_cannot_generate_are_refused_in_words(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = TraceInfo("model.gguf", "0" * 64, "gguf", "float32", (5,), (0,), (0,), platform="none")
    recorded = tmp_path / "trace.safetensors"
    with TraceWriter(recorded, info, layers=1) as writer:
        writer.write(OUTSIDE, Stage.EMBEDDING, np.zeros((1, 4), np.float32))
    assert run(str(recorded), pair[1], "--tokens", "5") == 4
    assert "a recorded trace holds one run" in capsys.readouterr().err
    assert run(f"hf:{tmp_path}", pair[1], "--tokens", "5") == 4
    assert run(*pair, "--tokens", "5", "--max-new-tokens", "0") == 2
    convert(Path(pair[1]), tmp_path / "ref.gguf", keep_blocks=True)
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else known(name))
    capsys.readouterr()
    assert run(pair[0], f"llama.cpp:{tmp_path / 'ref.gguf'}", "--tokens", "5") == 4
    assert "llama-cpp-python is not installed" in capsys.readouterr().err
