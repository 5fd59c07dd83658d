"""What llama.cpp computes from converted files, and the real models converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_gguf import tiny_tensors, write_tiny_gguf

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.gguf_format import GgufMetadata

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
K_QUANTS = {GATE: "Q4_K", UP: "Q4_K", DOWN: "Q6_K", "lm_head.weight": "Q6_K"}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("through", ["a.apr", "folder"])
def test_llama_cpp_computes_the_same_from_a_tiny_converted_file(
    llama_cpp: ModuleType, tmp_path: Path, through: str
) -> None:
    types = K_QUANTS if through == "a.apr" else {}
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=types, tied=True))
    convert(source, tmp_path / through)
    if through == "folder":
        # Without the record, metadata are made from nothing but the model.
        (tmp_path / "m").mkdir()
        for path in (tmp_path / through).iterdir():
            path.rename(tmp_path / "m" / path.name)
        strip_record(tmp_path / "m" / "model.safetensors")
        through = "m"
    convert(tmp_path / through, tmp_path / "back.gguf")
    tokens = [298, 72, 101, 280, 299]
    assert np.array_equal(logits(llama_cpp, source, tokens), logits(llama_cpp, tmp_path / "back.gguf", tokens))


def strip_record(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def logits(llama_cpp: ModuleType, path: Path, tokens: list[int]) -> np.ndarray:
    """All logits of llama.cpp's plain build, flash attention off."""
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=2, logits_all=True, verbose=False, flash_attn=False, use_mmap=True
    )
    try:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)], copy=True)
    finally:
        model.close()


@pytest.mark.real_model
@pytest.mark.llama_cpp
def test_the_real_model_survives_the_way_through_apr(
    model_path: Callable[[str], Path], llama_cpp: ModuleType, tmp_path: Path
) -> None:
    source = model_path("qwen2.5-coder-1.5b")
    report = convert(source, tmp_path / "a.apr")
    assert (report.tensors, report.copied, report.decoded) == (339, {"F32": 141, "Q4_K": 169, "Q6_K": 29}, {})
    before, apr = open_checkpoint(source), open_checkpoint(tmp_path / "a.apr")
    assert apr.config == before.config
    assert apr.vocabulary == before.vocabulary
    assert set(apr.tensors) == set(before.tensors)
    for name, tensor in before.tensors.items():
        assert apr.tensors[name].block_type == tensor.block_type
        assert apr.tensors[name].shape == tensor.shape
        assert np.array_equal(apr.tensors[name].data, tensor.data), name
    assert [finding for finding in apr.findings if finding.severity != "info"] == []
    convert(tmp_path / "a.apr", tmp_path / "back.gguf")
    back = open_checkpoint(tmp_path / "back.gguf")
    assert isinstance(back.metadata, GgufMetadata)
    assert isinstance(before.metadata, GgufMetadata)
    assert list(back.metadata.items()) == list(before.metadata.items())
    assert back.metadata.types == before.metadata.types
    for name, tensor in before.tensors.items():
        assert np.array_equal(back.tensors[name].data, tensor.data), name
    # Stronger than all of the above.
    assert back.sha256() == before.sha256()
    tokens = [3838, 374, 220, 17, 10, 17, 30]
    assert np.array_equal(logits(llama_cpp, source, tokens), logits(llama_cpp, tmp_path / "back.gguf", tokens))


@pytest.mark.real_model
@pytest.mark.parametrize("keep_blocks", [False, True])
def test_the_half_billion_model_is_widened(
    model_path: Callable[[str], Path], tmp_path: Path, keep_blocks: bool
) -> None:
    source = model_path("qwen2.5-coder-0.5b")
    report = convert(source, tmp_path / "a.apr", keep_blocks=keep_blocks)
    assert report.copied == ({"F32": 121, "Q4_K": 12, "Q6_K": 12} if keep_blocks else {"F32": 121})
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "a.apr")
    for name in ("lm_head.weight", GATE, DOWN, "model.layers.23.self_attn.k_proj.bias"):
        rows = slice(0, 500) if len(before.tensors[name].shape) > 1 else slice(None)
        assert np.array_equal(after.tensors[name].decode()[rows], before.tensors[name].decode()[rows])
