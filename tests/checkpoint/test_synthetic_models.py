"""The generator of full-size models: real shapes and types, valid blocks of the asked size, the same from one seed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from aprjax.blocks import block_format
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import CheckpointError
from aprjax.text.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
WIDTH = 512
# The layers whose ffn_down the published 1.5B file, of 28 layers as the 7B, holds as Q6_K. llama.cpp's `use_more_bits`
# counts layers in the order of their names (0 1 10 11 … 19 2 20 …): the first three, last four, every third between.
SIX_BITS_OF_28 = {0, 1, 5, 6, 7, 8, 9, 10, 13, 16, 19, 21, 24, 27}


@pytest.fixture(scope="module")
def synthetic() -> Iterator[ModuleType]:
    """The script, which imports its neighbour by its bare name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("synthetic")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def small(synthetic: ModuleType) -> Any:
    """The 1.5B's proportions, in a size that takes no time."""
    config = synthetic.config_of("1.5b", layers=2)
    return replace(config, hidden_size=256, num_heads=2, num_kv_heads=1, intermediate_size=WIDTH, vocab_size=300)


@pytest.fixture(scope="module")
def written(synthetic: ModuleType, small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    paths = {kind: folder / f"small.{kind}" for kind in ("gguf", "apr")}
    for path in paths.values():
        synthetic.write_synthetic(path, small)
    return paths


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q8_0"])
def test_blocks_have_the_size_asked_for_and_no_mean(synthetic: ModuleType, name: str) -> None:
    count, rms = 4096, 0.0125
    blocks = synthetic.RANDOM_BLOCKS[name](np.random.default_rng(0), count, rms)
    assert blocks.shape == (count, block_format(name).block_bytes)
    values = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[name]).astype(np.float64)
    assert values.size == count * block_format(name).block_size
    # 131,072 values and more, in 4,096 blocks of varying scale: means scatter by less than a hundredth of their size.
    assert abs(values.mean()) < 0.02 * rms
    assert np.sqrt(np.mean(values**2)) == pytest.approx(rms, rel=0.02)
    # No two blocks are alike.
    assert len({block.tobytes() for block in blocks}) == count


def test_the_file_is_what_gguf_py_reads(synthetic: ModuleType, small: Any, written: dict[str, Path]) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written["gguf"]).tensors}
    ours = open_checkpoint(written["gguf"])
    assert ours.config == small
    assert len(tensors) == len(ours.tensors) == 2 * 12 + 3
    assert not ours.findings
    for tensor in ours.tensors.values():
        theirs = tensors[tensor.stored_name]
        assert theirs.tensor_type.name == tensor.block_type
        assert tuple(reversed(theirs.shape.tolist())) == tensor.shape
        assert theirs.data.tobytes() == tensor.data.tobytes()


def test_both_containers_hold_the_same_blocks(written: dict[str, Path]) -> None:
    first, second = (open_checkpoint(written[kind]) for kind in ("gguf", "apr"))
    assert first.config == second.config
    assert set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        assert tensor.block_type == second.tensors[name].block_type
        assert np.array_equal(tensor.data, second.tensors[name].data), name
    assert first.vocabulary is not None
    assert second.vocabulary is not None
    assert first.vocabulary.tokens == second.vocabulary.tokens


def test_a_seed_is_a_model(synthetic: ModuleType, small: Any) -> None:
    def bytes_of(seed: int) -> dict[str, bytes]:
        return {tensor.name: tensor.data.tobytes() for tensor in synthetic.random_tensors(small, seed)}

    first, again, other = bytes_of(1), bytes_of(1), bytes_of(2)
    assert first == again
    assert all(first[name] != other[name] for name in first)
    # Tensors of one shape and type draw numbers of their own.
    assert first["model.layers.0.mlp.gate_proj.weight"] != first["model.layers.1.mlp.gate_proj.weight"]


def test_every_text_tokenizes(written: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(written["gguf"]))
    text = "<|im_start|>the naïve 中文 🙂\n"
    ids = tokenizer.encode(text)
    assert max(ids) < 300
    assert tokenizer.decode(ids) == text


def test_a_vocabulary_is_copied_and_must_fit(
    synthetic: ModuleType, small: Any, written: dict[str, Path], tmp_path: Path
) -> None:
    larger = replace(small, vocab_size=310)
    synthetic.write_synthetic(tmp_path / "larger.gguf", larger, vocabulary=written["gguf"])
    vocabulary = open_checkpoint(tmp_path / "larger.gguf").vocabulary
    source = open_checkpoint(written["gguf"]).vocabulary
    assert vocabulary is not None
    assert source is not None
    assert vocabulary.tokens[:300] == source.tokens
    assert vocabulary.tokens[300:] == tuple(f"[PAD{number}]" for number in range(300, 310))
    assert vocabulary.merges == source.merges
    with pytest.raises(CheckpointError, match="300 tokens for 299 rows"):
        synthetic.write_synthetic(tmp_path / "smaller.gguf", replace(small, vocab_size=299), vocabulary=written["gguf"])
    assert [path.name for path in tmp_path.iterdir()] == ["larger.gguf"]


def test_the_mix_of_types_is_q4_k_m(synthetic: ModuleType) -> None:
    def types(size: str, leaf: str) -> dict[int, str]:
        tensors = synthetic.random_tensors(synthetic.config_of(size), 0)
        return {int(t.name.split(".")[2]): t.block_type for t in tensors if t.name.endswith(leaf)}

    assert {layer for layer, name in types("7b", "down_proj.weight").items() if name == "Q6_K"} == SIX_BITS_OF_28
    assert set(types("7b", "gate_proj.weight").values()) == {"Q4_K"}
    # 29568 is no multiple of 256, and a model of 80 layers has five bits where others have four.
    assert set(types("72b", "down_proj.weight").values()) == {"Q5_0", "Q8_0"}
    assert set(types("72b", "v_proj.weight").values()) == {"Q5_K", "Q6_K"}


@pytest.mark.real_model
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_shapes_and_types_are_the_published_files(
    synthetic: ModuleType, model_path: Callable[[str], Path], size: str
) -> None:
    real = open_checkpoint(model_path(f"qwen2.5-coder-{size}"))
    assert synthetic.config_of(size) == real.config
    ours = {t.name: (t.block_type, t.shape) for t in synthetic.random_tensors(synthetic.config_of(size), 0)}
    assert ours == {name: (tensor.block_type, tensor.shape) for name, tensor in real.tensors.items()}


@pytest.mark.thorough
def test_writing_takes_little_memory(tmp_path: Path) -> None:
    script = FOLDER / "synthetic.py"
    command = [sys.executable, str(script), str(tmp_path / "half.gguf"), "--size", "0.5b", "--layers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    size = (tmp_path / "half.gguf").stat().st_size
    assert size > 240e6
    peak = int(outcome.stdout.rpartition("peak memory ")[2].split()[0]) * 2**20
    # Interpreter, NumPy, 152,000 tokens and a piece of 14 MiB: about 110 MiB, whatever the weights take.
    assert peak < 160 * 2**20, outcome.stdout


@pytest.mark.llama_cpp
@pytest.mark.thorough
def test_llama_cpp_runs_it_and_agrees(llama_cpp: ModuleType, written: dict[str, Path]) -> None:
    from aprjax.cli import main

    engine = f"llama.cpp:{written['gguf']}"
    assert main(["layers", "--model", str(written["apr"]), "--ref", engine, "--tokens", "5,17,40,5,90,3,7,8"]) == 0
