"""Sides that leave nothing to compare: every command says what and where, with exit code 3, and prints no verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, VOCABULARY, tiny_checkpoint, with_tensor, write_tiny

from aprjax.cli import main
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.memory import MemoryTrace, save
from aprjax.trace.sides import open_side

IDS = [3, 5, 7, 11, 13, 2]
TOKENS = ("--tokens", ",".join(map(str, IDS)))
BOTH = ("layers", "locate", "attribute")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test fills the user's cache of compiled programs."""
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and traces that do not go together."""
    folder = tmp_path_factory.mktemp("sides")
    base = write_tiny(folder / "base.apr", tiny_checkpoint())
    write_tiny(folder / "shallow.apr", tiny_checkpoint(replace(CONFIG, num_layers=2)))
    fewer = replace(CONFIG, vocab_size=CONFIG.vocab_size - 8)
    write_tiny(folder / "words.apr", tiny_checkpoint(fewer), vocabulary=None)
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.array(base.tensors[name].decode())
    values[4, 5] = np.nan
    write_tiny(folder / "nan.apr", with_tensor(base, name, values))
    swapped = list(VOCABULARY.tokens)
    first, second = (index for index, token in enumerate(swapped) if len(token) == 1 and token in "ab")
    swapped[first], swapped[second] = swapped[second], swapped[first]
    write_tiny(folder / "spelled.apr", base, vocabulary=replace(VOCABULARY, tokens=tuple(swapped)))

    whole = open_side(str(base.path)).trace(IDS)
    values = {key: np.array(whole[key]) for key in whole}
    save(whole, folder / "whole.safetensors")
    lacking = {key: value for key, value in values.items() if key[0] != 1 and key[1] is not Stage.LM_HEAD}
    save(MemoryTrace(whole.info, lacking), folder / "lacking.safetensors")
    values[1, Stage.FFN_GATE][2, 7] = np.nan
    save(MemoryTrace(whole.info, values), folder / "nan.safetensors")
    assert (OUTSIDE, Stage.LM_HEAD) in values
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and all that was printed, on one line."""
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, " ".join(f"{printed.out} {printed.err}".split())


@pytest.mark.parametrize("command", BOTH)
@pytest.mark.parametrize(("other", "key"), [("shallow.apr", "num_layers"), ("words.apr", "vocab_size")])
def test_other_dimensions(folder: Path, capsys: pytest.CaptureFixture[str], command: str, other: str, key: str) -> None:
    code, text = said(capsys, command, "--model", str(folder / other), "--ref", str(folder / "base.apr"), *TOKENS)
    assert code == 3
    assert key in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", ["locate", "attribute"])
def test_tokenizers_that_disagree(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    sides = ("--model", str(folder / "spelled.apr"), "--ref", str(folder / "base.apr"))
    code, text = said(capsys, command, *sides, "--prompt", "ab")
    assert code == 3
    assert "the tokenizers disagree from position 0" in text
    assert "--tokens" in text


@pytest.mark.parametrize("command", BOTH)
def test_a_trace_of_other_tokens(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    sides = ("--model", str(folder / "base.apr"), "--ref", str(folder / "whole.safetensors"))
    code, text = said(capsys, command, *sides, "--tokens", "3,5,7")
    assert code == 3
    assert "the trace is of 6 tokens" in text


@pytest.mark.parametrize("command", ["locate", pytest.param("attribute", marks=pytest.mark.thorough)])
def test_a_trace_without_what_is_needed(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    sides = ("--model", str(folder / "base.apr"), "--ref", str(folder / "lacking.safetensors"))
    code, text = said(capsys, command, *sides)
    assert code == 3
    assert "the trace " in text
    assert "fix: record the trace" in text or "likely fix: record the trace" in text


@pytest.mark.parametrize(
    "command", ["layers", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("replay", "explain"))]
)
def test_a_trace_with_missing_stages_agrees_with_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file, trace = str(folder / "base.apr"), str(folder / "lacking.safetensors")
    sides = ("--model", trace, "--ref", file) if command == "layers" else (trace, "--file", file)
    code, text = said(capsys, command, *sides)
    assert code == 3
    assert "which were not measured: everything of layer 1; lm_head; record it again with all stages" in text


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param("layers", "position 2, channel 7", marks=pytest.mark.thorough),
        ("locate", "nan in ffn_gate of layer 1, row 2, channel 7"),
        ("attribute", "nan in ffn_gate of layer 1, position 2, channel 7"),
        pytest.param("replay", "position 2, channel 7", marks=pytest.mark.thorough),
    ],
)
def test_nan_in_a_trace_is_named_with_its_first_position(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    trace, file = str(folder / "nan.safetensors"), str(folder / "base.apr")
    if command == "replay":
        code, text = said(capsys, "replay", trace, "--file", file)
    else:
        code, text = said(capsys, command, "--model", file, "--ref", trace)
    assert code == (1 if command == "replay" else 3)
    assert place in text


@pytest.mark.thorough
def test_a_file_that_is_not_finite_is_located(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty, file = str(folder / "nan.apr"), str(folder / "base.apr")
    code, text = said(capsys, "locate", "--model", faulty, "--ref", file, *TOKENS, "--json", str(folder / "out.json"))
    assert code == 1
    assert "layer 1, ffn_up" in text
    assert "not finite" in text
    code, text = said(capsys, "locate", "--model", file, "--ref", faulty, *TOKENS)
    assert code == 3
    assert "the reference's logit" in text
    code, text = said(capsys, "attribute", "--model", faulty, "--ref", file, *TOKENS)
    assert code == 3
    assert "nan in ffn_up of layer 1, position 0, channel 4" in text
