"""`open_side`: each kind of side from its text, and clear words where it is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tiny import tiny_checkpoint, write_tiny
from trace_samples import TOKENS, assert_same_values, sample

from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.trace import save
from aprjax.trace.aprt_writer import write_aprt
from aprjax.trace.llama_cpp import LlamaOptions
from aprjax.trace.sides import NoTokens, open_side


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind."""
    folder = tmp_path_factory.mktemp("sides")
    write_tiny(folder / "model.apr", tiny_checkpoint())
    convert(folder / "model.apr", folder / "model.gguf", keep_blocks=True)
    convert(folder / "model.apr", folder / "hf")
    save(sample(), folder / "trace.safetensors")
    write_aprt(sample(), folder / "aprt")
    return folder


def test_checkpoints_run_under_an_arithmetic(files: Path) -> None:
    for name in ("model.gguf", "hf", "model.apr"):
        side = open_side(str(files / name))
        assert (side.kind, side.tokens) == ("checkpoint", None)
        assert side.checkpoint is not None
    # As many tokens as the command's test pads its prompt to: one compilation for both.
    trace = side.trace([3] * 32, arithmetic=PRESETS["float32"])
    assert (trace.info.sha256, trace.info.arithmetic) == (side.checkpoint.sha256(), "float32")
    assert len(trace) == 3 + 17 * 3
    assert trace[OUTSIDE, Stage.LM_HEAD].shape == (32, side.checkpoint.config.vocab_size)


def test_recorded_sides_are_read(files: Path) -> None:
    saved, folder = open_side(str(files / "trace.safetensors")), open_side(str(files / "aprt"))
    assert (saved.kind, folder.kind) == ("trace", "aprt")
    assert saved.tokens == folder.tokens == TOKENS
    assert_same_values(saved.trace(), sample())
    assert folder.trace(list(TOKENS)).info.head_positions == (4,)


def test_a_recorded_side_is_not_compared_on_other_tokens(files: Path) -> None:
    for name in ("trace.safetensors", "aprt"):
        with pytest.raises(CheckpointError, match=r"made of the tokens 3,1,4,1,5, and is to be compared on 3,1,4\."):
            open_side(str(files / name)).trace([3, 1, 4])


def test_only_aprjax_takes_an_arithmetic(files: Path) -> None:
    for text in (files / "trace.safetensors", f"llama.cpp:{files / 'model.gguf'}", f"hf:{files / 'hf'}"):
        with pytest.raises(CheckpointError, match="has its own"):
            open_side(str(text)).trace(list(TOKENS), arithmetic=PRESETS["float64"])


def test_a_model_needs_tokens_of_its_vocabulary(files: Path) -> None:
    side = open_side(str(files / "model.gguf"))
    with pytest.raises(NoTokens, match="give --prompt or --tokens"):
        side.trace()
    for text in (files / "model.gguf", f"llama.cpp:{files / 'model.gguf'}", f"hf:{files / 'hf'}"):
        for wrong in ([], [10**6], [-1]):
            with pytest.raises(CheckpointError, match="expected token ids from 0 to"):
                open_side(str(text)).trace(wrong)


def test_options_of_llama_cpp(files: Path) -> None:
    path = files / "model.gguf"
    assert open_side(f"llama.cpp:{path}").options == LlamaOptions()
    words = "kv=f16,flash-attention,tiled,repack,threads=3,step=1,library=lib"
    wanted = LlamaOptions("f16", "f16", flash_attention=True, threads=3, tiled=True, repack=True, step=1, library="lib")
    assert open_side(f"llama.cpp[{words}]:{path}").options == wanted
    for word in ("kv=q8_0", "threads=0", "threads", "fast", "library="):
        with pytest.raises(CheckpointError, match=r"is unknown.*flash-attention"):
            open_side(f"llama.cpp[{word}]:{path}")


WRONG = {
    "llama.cpp:hf": "expected llama.cpp:FILE.gguf",
    "llama.cpp:model.apr": "format apr",
    "hf:model.gguf": "expected hf:DIR",
    "llama.cpp:missing.gguf": "missing.gguf",
    "hf:missing": "missing",
    "missing.safetensors": "missing.safetensors",
    "empty": "empty",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_what_is_no_side(files: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(files)
    (files / "empty").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=message):
        open_side(text)


def test_a_path_that_begins_like_an_engine(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    (files / "hf:model.apr").write_bytes((files / "model.apr").read_bytes())
    assert open_side("./hf:model.apr").kind == "checkpoint"


def test_a_damaged_trace_is_called_a_trace(files: Path, tmp_path: Path) -> None:
    content = (files / "trace.safetensors").read_bytes()
    for name, damaged in (("cut", content[:-100]), ("garbled", content.replace(b'"F32"', b'"F3"'))):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable trace"):
            open_side(str(path))


def test_weights_are_not_taken_for_a_trace(files: Path, tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "model.safetensors"
    save_file({"model.norm.weight": np.zeros(4, np.float32)}, path)
    with pytest.raises(CheckpointError) as caught:
        open_side(str(path))
    assert "trace" not in caught.value.message
