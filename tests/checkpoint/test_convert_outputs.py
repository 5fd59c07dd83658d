"""Outputs of a conversion are whole or absent, whatever happens; sources stay; memory stays small."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf import TINY, tiny_tensors, write_tiny_gguf

from aprjax.blocks import byte_size
from aprjax.checkpoint import CheckpointError
from aprjax.checkpoint.convert import convert

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_incomplete_model_is_not_converted(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    source = write_tiny_gguf(tmp_path / "s.gguf", tensors)
    for target in ("a.apr", "b.gguf", "m"):
        with pytest.raises(CheckpointError, match=r"cannot be converted: model.layers.1.self_attn.v_proj.bias"):
            convert(source, tmp_path / target)
    assert os.listdir(tmp_path) == ["s.gguf"]


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf")
    digest = sha256(source)
    (tmp_path / "link.apr").symlink_to(source)
    os.link(source, tmp_path / "hard.apr")
    for target in ("s.gguf", "link.apr", "hard.apr", "../" + tmp_path.name + "/s.gguf"):
        with pytest.raises(CheckpointError, match="the target is the source"):
            convert(source, tmp_path / target)
    convert(source, tmp_path / "m")
    with pytest.raises(CheckpointError, match="the target is the source"):
        convert(tmp_path / "m", tmp_path / "m")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(source, tmp_path / "m")
    assert sha256(source) == digest


def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf")
    for target in ("absent/a.gguf", "absent/a.apr", "absent/m"):
        with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
            convert(source, tmp_path / target)
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(CheckpointError, match="a folder stands where"):
        convert(source, tmp_path / "a.gguf")
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "s.gguf"]


@pytest.mark.parametrize("target", ["out.gguf", "out.apr", "out"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_the_old_output(tmp_path: Path, target: str, failure: BaseException) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf")
    if target != "out":
        (tmp_path / target).write_text("old")
    before = sorted(os.listdir(tmp_path))
    calls = 0

    def fail_on_the_third(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise failure

    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(source, tmp_path / target, progress=fail_on_the_third)
    assert sorted(os.listdir(tmp_path)) == before
    if target != "out":
        assert (tmp_path / target).read_text() == "old"


@pytest.mark.parametrize("target", ["out.gguf", "out.apr", "out"])
def test_progress_counts_every_byte_once(tmp_path: Path, target: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf")
    steps: list[tuple[int, int]] = []
    report = convert(source, tmp_path / target, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (report.nbytes, report.nbytes)
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {report.nbytes}


def test_the_report_is_json(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types={UP: "Q8_0"}))
    content = json.loads(json.dumps(convert(source, tmp_path / "a.apr").to_json(), allow_nan=False))
    assert content["schema"] == "aprjax.conversion/1"
    assert (content["source_format"], content["target_format"], content["tensors"]) == ("gguf", "apr", 27)
    assert content["decoded"] == {"F16 -> F32": 15, "Q8_0 -> F32": 1}


@pytest.mark.thorough
def test_memory_stays_small_beside_the_files(tmp_path: Path) -> None:
    """A tensor many times the size of a piece is decoded piece by piece."""
    import tracemalloc

    wide = replace(TINY, num_layers=1, intermediate_size=65_536)
    source = write_tiny_gguf(
        tmp_path / "s.gguf", tiny_tensors(wide, types={GATE: "Q8_0", UP: "Q8_0", DOWN: "Q8_0"}), config=wide
    )
    tracemalloc.start()
    convert(source, tmp_path / "a.apr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert byte_size("F32", (65_536, 256)) == 64 << 20
    # A piece is 4 Mi elements: as float32, its decoding's temporaries, and its bytes (16 MiB each).
    assert peak < 200 << 20
