"""Saved traces: every bit comes back, and no damaged or foreign file passes for one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoint.fuzzing import Damage, damages
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from trace_samples import assert_same_values, same_bits, sample

from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import MemoryTrace, Trace, TraceWriter, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "trace.safetensors"
    save(sample(), path)
    return path


def edited(saved: Path, target: Path, **changes: object) -> Path:
    """The saved trace with other metadata; `info` is merged."""
    content = saved.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header["__metadata__"]
    info = changes.pop("info", None)
    if isinstance(info, dict):
        metadata["info"] = json.dumps(json.loads(metadata["info"]) | info)
    metadata.update(changes)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return target


def test_every_bit_comes_back(saved: Path) -> None:
    trace = Trace.load(saved)
    assert trace.info == sample().info
    assert_same_values(trace, sample())
    assert set(trace.extra) == set(sample().extra)
    for name, value in sample().extra.items():
        assert same_bits(trace.extra[name], value)
    assert_same_values(MemoryTrace.load(saved), sample())


def test_the_file_is_a_plain_safetensors_file(saved: Path) -> None:
    values = load_file(saved)
    assert same_bits(values["layer.1/ffn_gate"], sample()[1, Stage.FFN_GATE])
    assert same_bits(values["whole/lm_head"], sample()[OUTSIDE, Stage.LM_HEAD])


def test_keys_come_in_execution_order(saved: Path) -> None:
    stages = [stage for layer, stage in Trace.load(saved) if layer == 1]
    assert stages == [stage for stage in Stage if stage in stages]
    assert len(stages) == 17


def test_what_was_not_captured_has_no_value(saved: Path) -> None:
    trace = Trace.load(saved)
    for absent in ((2, Stage.FFN_GATE), (OUTSIDE, Stage.FFN_GATE)):
        with pytest.raises(KeyError):
            trace[absent]
    with pytest.raises(KeyError):
        trace.extra["kq-1:MUL_MAT"]


def test_rows_of_some_positions(tmp_path: Path) -> None:
    some = sample(positions=(1, 4), heads=(4,))
    save(some, tmp_path / "some.safetensors")
    trace = Trace.load(tmp_path / "some.safetensors")
    assert (trace.info.positions, trace.info.head_positions) == ((1, 4), (4,))
    assert_same_values(trace, some)


WRONG = {
    "another schema": ({"schema": "aprjax.trace/2"}, "schema"),
    "another capture point": ({"capture_points": json.dumps({"qkv_matmul": "after the bias"})}, "before the bias"),
    "no capture points": ({"capture_points": "{}"}, "captured"),
    "capture points of another kind": ({"capture_points": "[]"}, "not a readable trace"),
    "positions beyond the tokens": ({"info": {"positions": [0, 1, 2, 3, 5]}}, "beyond its 5 tokens"),
    "negative positions": ({"info": {"positions": [0, 1, 2, 3, -1]}}, "whole numbers"),
    "fewer positions than rows": ({"info": {"positions": [0, 1]}}, "expected as F32 with 2 rows"),
    "tokens of another kind": ({"info": {"tokens": ["a"]}}, "whole numbers"),
    "an unknown field": ({"info": {"wind": "west"}}, "wind"),
    "a path of another kind": ({"info": {"path": 3}}, "path is expected as text"),
    "an engine of another kind": ({"info": {"engine": {"threads": 2}}}, "threads is expected as text"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_metadata_is_refused(saved: Path, tmp_path: Path, changes: dict, message: str) -> None:
    path = edited(saved, tmp_path / "wrong.safetensors", **{**changes})
    with pytest.raises(CheckpointError, match=message) as caught:
        Trace.load(path)
    assert caught.value.file == str(path)
    assert caught.value.fix


def test_an_edit_that_changes_nothing_is_read(saved: Path, tmp_path: Path) -> None:
    assert_same_values(Trace.load(edited(saved, tmp_path / "same.safetensors")), sample())


@pytest.mark.parametrize("name", ["layer.1/ffn_gates", "layer.x/ffn_gate", "somewhere"])
def test_an_unknown_value_is_refused(tmp_path: Path, name: str) -> None:
    trace = sample()
    path = tmp_path / "unknown.safetensors"
    save(trace, path)
    with safe_open(path, framework="numpy") as stream:
        metadata = stream.metadata()
    save_file({name: np.zeros((5, 8), np.float32)}, path, metadata)
    with pytest.raises(CheckpointError, match="not a readable trace"):
        Trace.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("a text")
    for name in ("model.safetensors", "text", "missing", "."):
        with pytest.raises(CheckpointError, match="not a readable trace"):
            Trace.load(tmp_path / name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages(header=6000, size=60000))
def test_a_damaged_file_is_refused_or_read_within_its_bounds(saved: Path, tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(saved.read_bytes()))
    try:
        trace = Trace.load(path)
    except CheckpointError as error:
        named = error.file
    else:
        named = str(trace.path)
        assert all(trace[key].shape == trace.shapes[key] for key in trace)
    assert named == str(path)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"what stood here")
    trace = sample()

    class Breaking(MemoryTrace):
        def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
            if key == (1, Stage.FFN_OUT):
                raise RuntimeError("in between")
            return super().__getitem__(key)

    with pytest.raises(RuntimeError, match="in between"):
        save(Breaking(trace.info, trace.values), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.safetensors"]
    assert path.read_bytes() == b"what stood here"


def test_an_incomplete_value_is_an_error(tmp_path: Path) -> None:
    trace = sample()
    writer = TraceWriter(tmp_path / "trace.safetensors", trace.info, layers=2)
    with pytest.raises(ValueError, match="declared with"), writer:
        writer.write(0, Stage.ATTN_NORM, trace[0, Stage.ATTN_NORM][:2], total_rows=5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_vanishes_is_named(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    path.write_bytes(saved.read_bytes())
    trace = Trace.load(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        trace[0, Stage.ATTN_NORM]
