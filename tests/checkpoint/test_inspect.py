"""Inspection: facts that agree with the file, and weights that are not finite."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import TINY, tiny_tensors, write_tiny_gguf

from aprjax.blocks import FORMATS, byte_size, dequantize
from aprjax.checkpoint import CheckpointError, EncodedTensor
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.finite import nonfinite_blocks
from aprjax.checkpoint.inspect import inspect, printable
from aprjax.checkpoint.render import render_conversion, render_inspection

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("target", ["s.gguf", "a.apr", "folder"])
def test_facts_agree_with_the_file(tmp_path: Path, target: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types={UP: "Q4_K"} if target != "folder" else {}))
    if target != "s.gguf":
        convert(source, tmp_path / target)
    path = tmp_path / target
    inspection = inspect(path)
    weights = path / "model.safetensors" if target == "folder" else path
    assert inspection.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert inspection.files == {str(weights): weights.stat().st_size}
    assert inspection.config == TINY
    assert len(inspection.tensors) == 27
    content = weights.read_bytes()
    for tensor in inspection.tensors:
        assert tensor.nbytes == byte_size(tensor.block_type, tensor.shape)
        assert tensor.offset + tensor.nbytes <= len(content)
    by_type = {entry.block_type: (entry.tensors, entry.nbytes) for entry in inspection.block_types}
    assert by_type.get("Q4_K") == (None if target == "folder" else (1, 512 * 144))
    assert sum(count for count, _ in by_type.values()) == 27
    assert inspection.tied_head is False
    assert inspection.vocabulary is not None
    assert (inspection.vocabulary.tokens, inspection.vocabulary.merges) == (300, 40)
    assert inspection.vocabulary.token_types == {"normal": 296, "unused": 1, "control": 3}
    assert inspection.vocabulary.digest == inspect(source, whole=False).vocabulary.digest  # type: ignore[union-attr]
    assert json.loads(json.dumps(inspection.to_json(), allow_nan=False))["schema"] == "aprjax.inspection/1"


def test_long_and_strange_metadata_are_shortened_and_made_safe(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    extra: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "custom.escape": ("\x1b[31mred\x07", kinds.STRING),
        "custom.long": ("x" * 1000, kinds.STRING),
        "custom.nan": (float("nan"), kinds.FLOAT32),
        "custom.markup": ("[bold]not bold[/bold] [/]", kinds.STRING),
    }
    path = write_tiny_gguf(tmp_path / "[red]s.gguf", extra=extra)
    metadata = inspect(path).metadata
    assert metadata["custom.escape"] == "\\x1b[31mred\\x07"
    assert metadata["custom.long"] == "x" * 200 + "… (1000 characters)"
    assert metadata["custom.nan"] == "nan"
    assert metadata["tokenizer.ggml.tokens"] == "(300 elements)"
    assert printable("a\ud800\n") == "a\\ud800\n"


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "AprQ4"]
)
def test_scales_tell_the_same_as_decoding(name: str) -> None:
    """Random bytes: one scale in 32 is not finite, so about every block type meets both cases many times."""
    blocks = FORMATS[name]
    random = np.random.default_rng(5)
    count = 3000
    data = random.integers(0, 256, count * blocks.block_bytes, dtype=np.uint8)
    tensor = EncodedTensor("t", (count, blocks.block_size), name, data, offset=1000)
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = dequantize(name, data, tensor.shape)
    bad = ~np.isfinite(decoded).all(axis=1)
    assert 0 < bad.sum() < count
    assert nonfinite_blocks(tensor) == (int(bad.sum()), 1000 + int(np.argmax(bad)) * blocks.block_bytes)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_looked_at_one_by_one(name: str) -> None:
    random = np.random.default_rng(6)
    data = random.integers(0, 256, byte_size(name, (100_000,)), dtype=np.uint8)
    tensor = EncodedTensor("t", (100_000,), name, data)
    bad = ~np.isfinite(dequantize(name, data, tensor.shape))
    assert bad.sum() > 0
    assert nonfinite_blocks(tensor) == (int(bad.sum()), int(np.argmax(bad)) * FORMATS[name].block_bytes)


def test_nan_weights_are_a_finding(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    block_type, data = tensors[UP]
    data = data.copy()
    data.view(np.float16)[1234] = np.nan
    path = write_tiny_gguf(tmp_path / "s.gguf", {**tensors, UP: (block_type, data)})
    inspection = inspect(path)
    offset = next(tensor.offset for tensor in inspection.tensors if tensor.name == UP)
    assert [(f.id, f.severity, f.tensor, f.offset) for f in inspection.findings] == [
        ("values-not-finite", "error", UP, offset + 2 * 1234)
    ]
    assert inspect(path, whole=False).findings == ()
    assert "values-not-finite" in {finding.id for finding in inspect(path, values=True).findings}


def test_another_architecture_can_still_be_listed(tmp_path: Path) -> None:
    other = {"general.architecture": ("llama", gguf.GGUFValueType.STRING)}
    inspection = inspect(write_tiny_gguf(tmp_path / "s.gguf", extra=other))
    assert inspection.config is None
    assert len(inspection.tensors) == 27
    assert [finding.id for finding in inspection.findings] == ["architecture-unsupported"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(CheckpointError, match="expected a GGUF"):
        inspect(tmp_path / "noise")


def test_rendering_shows_text_from_files_as_text(tmp_path: Path) -> None:
    from rich.console import Console

    tensors = tiny_tensors() | {"[red]odd[/red].weight": ("F32", np.zeros(16, np.uint8))}
    source = write_tiny_gguf(tmp_path / "[bold]s.gguf", tensors)
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    render_inspection(inspect(source), console)
    render_conversion(convert(source, tmp_path / "b.gguf"), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]s.gguf" in text
    assert "[red]odd[/red].weight" in text
    assert "unexpected-tensor" in text
    assert "2 layers, hidden 256" in text
    assert "28 tensors" in text


def test_the_closing_crc_of_an_apr_file_is_checked_when_the_whole_is_read(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_tensors())
    target = tmp_path / "tiny.apr"
    convert(tmp_path / "tiny.gguf", target)
    assert "apr-footer-crc-wrong" not in {finding.id for finding in inspect(target).findings}
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    assert "apr-footer-crc-wrong" in {finding.id for finding in inspect(target).findings}
    assert "apr-footer-crc-wrong" not in {finding.id for finding in inspect(target, whole=False).findings}
