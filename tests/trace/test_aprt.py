"""APRT folders: the bytes are upstream's, every bit comes back, and nothing unvouched or damaged is compared."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint.fuzzing import Damage, damages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_samples import SPECIAL, TOKENS, assert_same_values, same_bits, sample

from aprjax.checkpoint.types import CheckpointError, ModelConfig
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace import MemoryTrace
from aprjax.trace.aprt import is_aprt_folder, open_aprt
from aprjax.trace.aprt_writer import write_aprt

CONFIG = ModelConfig("qwen2", 8, 2, 2, 1, 4, 12, 11, 64, 1e6, "neox", 1e-6)
LAST = (len(TOKENS) - 1,)
# Elements per position under CONFIG, by the model's definition.
WIDTHS = {
    Stage.QKV_MATMUL: 16,
    Stage.QKV_BIAS: 16,
    Stage.K_POST_ROPE: 4,
    Stage.FFN_GATE: 12,
    Stage.FFN_UP: 12,
    Stage.FFN_SILU: 12,
    Stage.FFN_SWIGL: 12,
    Stage.LM_HEAD: 11,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_aprt(sample(), tmp_path / "aprt")
    return tmp_path / "aprt"


def aprt_bytes(layer: int, values: np.ndarray) -> bytes:
    """The format as upstream documents it, written independently."""
    header = b"APRT" + struct.pack("<I", 0xFFFFFFFF if layer < 0 else layer) + struct.pack("<I", values.size)
    return header + b"".join(struct.pack("<I", bits) for bits in values.reshape(-1).view(np.uint32).tolist())


def upstream_folder(folder: Path, *, head_rows: int = 1) -> dict[tuple[int, Stage], np.ndarray]:
    """What `apr trace --save-tensor all` leaves for CONFIG's model and TOKENS: no sidecar, one row of logits."""
    generator = np.random.default_rng(3)
    values = {}
    for layer, stage in sample():
        rows = head_rows if stage in (Stage.FINAL_NORM, Stage.LM_HEAD) else len(TOKENS)
        width = 2 * len(TOKENS) if stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX) else WIDTHS.get(stage, 8)
        values[layer, stage] = generator.normal(size=(rows, width)).astype(np.float32)
        target = folder / (f"{stage}.bin" if layer == OUTSIDE else f"layer-{layer}/{stage}.bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(aprt_bytes(layer, values[layer, stage]))
    return values


def test_the_bytes_are_those_of_the_format(folder: Path) -> None:
    trace = sample()
    assert (folder / "layer-1" / "ffn_gate.bin").read_bytes() == aprt_bytes(1, trace[1, Stage.FFN_GATE])
    # Upstream counts the embedding among the stages of a layer.
    assert (folder / "layer-0" / "embedding.bin").read_bytes() == aprt_bytes(0, trace[OUTSIDE, Stage.EMBEDDING])
    # Upstream keeps the last token's logits only.
    assert (folder / "lm_head.bin").read_bytes() == aprt_bytes(-1, trace[OUTSIDE, Stage.LM_HEAD][-1:])
    assert len(list(folder.rglob("*.bin"))) == 2 * len(LAYER_STAGES) + 3


def test_every_bit_comes_back(folder: Path) -> None:
    trace = open_aprt(folder)
    expected = sample(heads=LAST)
    assert list(trace) == list(expected)
    for key in trace:
        rows = sample()[key][-1:] if key[1] in (Stage.FINAL_NORM, Stage.LM_HEAD) else sample()[key]
        assert same_bits(trace[key], rows), key
    provenance = trace.info.engine["provenance"]
    told = replace(trace.info, engine={k: v for k, v in trace.info.engine.items() if k != "provenance"})
    assert told == replace(sample().info, head_positions=LAST)
    assert "tokens:                [3, 1, 4, 1, 5]\n" in provenance
    assert "model:                 model.gguf\n" in provenance


def test_a_second_trip_changes_nothing_and_keeps_the_provenance(folder: Path, tmp_path: Path) -> None:
    first = open_aprt(folder)
    write_aprt(first, tmp_path / "second")
    second = open_aprt(tmp_path / "second")
    assert_same_values(second, first)
    assert first.info.engine["provenance"] in second.info.engine["provenance"]


def test_what_the_format_cannot_hold_is_said(tmp_path: Path) -> None:
    notes = write_aprt(sample(heads=(0, 2)), tmp_path / "aprt")
    assert len(notes) == 2
    assert "own nodes" in notes[0]
    assert "lm_head is left out" in notes[1]
    assert not (tmp_path / "aprt" / "lm_head.bin").exists()
    assert open_aprt(tmp_path / "aprt").info.head_positions == (0, 2)


def test_a_folder_with_something_in_it_is_left_alone(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.bin")}
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write_aprt(sample(), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.bin")} == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    class Breaking(MemoryTrace):
        def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
            if key == (1, Stage.FFN_OUT):
                raise RuntimeError("in between")
            return super().__getitem__(key)

    trace = sample()
    with pytest.raises(RuntimeError, match="in between"):
        write_aprt(Breaking(trace.info, trace.values), tmp_path / "aprt")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_upstreams_with_model_and_tokens(tmp_path: Path) -> None:
    values = upstream_folder(tmp_path / "apr")
    with pytest.raises(CheckpointError, match="say neither their tokens nor their shapes"):
        open_aprt(tmp_path / "apr")
    with pytest.raises(CheckpointError, match="say neither"):
        open_aprt(tmp_path / "apr", config=CONFIG)
    trace = open_aprt(tmp_path / "apr", config=CONFIG, tokens=list(TOKENS))
    assert trace.info.head_positions == LAST
    assert trace.info.sha256 == ""
    # Which of heads and positions comes first is not said anywhere.
    assert {name.rpartition("/")[2] for name in trace.unvouched} == {"attn_scores.bin", "attn_softmax.bin"}
    assert set(trace) == {key for key in values if key[1] not in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)}
    for key in trace:
        assert same_bits(trace[key], values[key])


def test_a_final_norm_of_all_rows_is_cut_to_the_rows_of_the_logits(tmp_path: Path) -> None:
    upstream_folder(tmp_path)
    norm = np.arange(len(TOKENS) * 8, dtype=np.float32).reshape(-1, 8)
    (tmp_path / "final_norm.bin").write_bytes(aprt_bytes(-1, norm))
    trace = open_aprt(tmp_path, config=CONFIG, tokens=list(TOKENS))
    assert trace.info.head_positions == LAST
    assert same_bits(trace[OUTSIDE, Stage.FINAL_NORM], norm[-1:])


def test_one_row_of_several_positions_is_not_guessed(tmp_path: Path) -> None:
    upstream_folder(tmp_path)
    (tmp_path / "layer-1" / "ffn_out.bin").write_bytes(aprt_bytes(1, np.zeros((1, 8), np.float32)))
    trace = open_aprt(tmp_path, config=CONFIG, tokens=list(TOKENS))
    assert "one of 5 positions" in trace.unvouched["layer-1/ffn_out.bin"]
    with pytest.raises(KeyError):
        trace[1, Stage.FFN_OUT]


def test_other_tokens_or_another_model_are_seen(tmp_path: Path) -> None:
    upstream_folder(tmp_path)
    other = open_aprt(tmp_path, config=CONFIG, tokens=[1, 2, 3])
    assert "other tokens or another model" in other.unvouched["layer-0/ffn_gate.bin"]
    narrow = open_aprt(tmp_path, config=replace(CONFIG, num_layers=1), tokens=list(TOKENS))
    assert narrow.unvouched["layer-1/ffn_gate.bin"] == "the model has 1 layers"


def test_upstreams_alias_of_the_layers_output(tmp_path: Path) -> None:
    values = upstream_folder(tmp_path)
    (tmp_path / "layer-0" / "post_ffn_residual.bin").rename(tmp_path / "layer-0" / "layer_output.bin")
    trace = open_aprt(tmp_path, config=CONFIG, tokens=list(TOKENS))
    assert same_bits(trace[0, Stage.POST_FFN_RESIDUAL], values[0, Stage.POST_FFN_RESIDUAL])


def _replaced(path: Path, position: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(new)] = new
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another magic": (lambda d: _replaced(d / "layer-1/ffn_up.bin", 0, b"APRX"), "magic"),
    "another layer": (lambda d: _replaced(d / "layer-1/ffn_up.bin", 4, b"\2\0\0\0"), "expected layer 1"),
    "a layer that is the whole model": (lambda d: _replaced(d / "layer-1/ffn_up.bin", 4, b"\xff" * 4), "layer 1"),
    "more elements than bytes": (lambda d: _replaced(d / "layer-1/ffn_up.bin", 8, b"\xff" * 4), "the file has"),
    "cut off": (lambda d: (d / "layer-1/ffn_up.bin").write_bytes(b"APRT"), "magic"),
    "empty": (lambda d: (d / "layer-0/embedding.bin").write_bytes(b""), "magic"),
    "an unknown stage": (lambda d: shutil.copy(d / "lm_head.bin", d / "logits.bin"), "20 stages"),
    "a stage at the wrong place": (lambda d: shutil.copy(d / "lm_head.bin", d / "layer-1"), "20 stages"),
    "a layer without a number": (lambda d: (d / "layer-1").rename(d / "layer-one"), "20 stages"),
    "a missing file": (lambda d: (d / "layer-1/ffn_up.bin").unlink(), "its file is missing"),
    "no sidecar": (lambda d: (d / "_aprjax.json").unlink(), "has no _aprjax.json"),
    "a sidecar that is no JSON": (lambda d: (d / "_aprjax.json").write_text("{"), "not a readable sidecar"),
    "a sidecar that is a list": (lambda d: (d / "_aprjax.json").write_text("[]"), "not a readable sidecar"),
    "a sidecar nested to the depths": (lambda d: (d / "_aprjax.json").write_text("[" * 10**5), "not a readable"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_and_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_aprt(folder)
    assert caught.value.file is not None
    assert caught.value.file.startswith(str(folder))
    assert caught.value.fix


def _first(document: dict, **changes: object) -> None:
    document["files"][0].update(changes)


WRONG_SIDECARS: dict[str, tuple[Callable[[dict], object], str]] = {
    "schema": (lambda d: d.update(schema="aprjax.aprt/2"), "schema"),
    "capture point": (lambda d: d["capture_points"].update(qkv_bias="before the bias"), "after the bias"),
    "shape": (lambda d: _first(d, shape=[4, 8]), "and has 40"),
    "negative shape": (lambda d: _first(d, shape=[-5, -8]), "and has 40"),
    "positions": (lambda d: _first(d, positions=[0, 1, 2, 3]), "at 4 positions"),
    "other positions": (lambda d: _first(d, positions=[0, 1, 2, 3, 3]), "other positions"),
    "stage": (lambda d: _first(d, stage="embeddings"), "embeddings"),
    "digest": (lambda d: _first(d, sha256="0"), "no SHA-256"),
    "logits beyond the tokens": (
        lambda d: next(file for file in d["files"] if file["stage"] == "lm_head").update(positions=[9]),
        "beyond the 5 tokens",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_SIDECARS.values(), ids=WRONG_SIDECARS.keys())
def test_a_sidecar_that_contradicts_the_files_is_refused(
    folder: Path, change: Callable[[dict], object], message: str
) -> None:
    document = json.loads((folder / "_aprjax.json").read_text())
    change(document)
    (folder / "_aprjax.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        open_aprt(folder)


def test_a_changed_value_is_not_vouched_for(folder: Path) -> None:
    _replaced(folder / "layer-1" / "ffn_up.bin", 40, b"\x01")
    trace = open_aprt(folder)
    with pytest.raises(CheckpointError, match=r"not the one that _aprjax\.json vouches for"):
        trace[1, Stage.FFN_UP]
    trace[1, Stage.FFN_GATE]  # the others are sound


def test_a_file_that_the_sidecar_does_not_name_is_not_compared(folder: Path) -> None:
    document = json.loads((folder / "_aprjax.json").read_text())
    document["files"] = [entry for entry in document["files"] if entry["stage"] != "ffn_up"]
    (folder / "_aprjax.json").write_text(json.dumps(document))
    trace = open_aprt(folder)
    assert (0, Stage.FFN_UP) not in set(trace)
    assert trace.unvouched == dict.fromkeys(
        ["layer-0/ffn_up.bin", "layer-1/ffn_up.bin"], "_aprjax.json does not name it"
    )


def read(folder: Path, key: tuple[int, Stage]) -> tuple[np.ndarray | None, str | None]:
    """The value, or the file that an error names."""
    try:
        return open_aprt(folder)[key], None
    except CheckpointError as error:
        return None, error.file


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["layer-0/embedding.bin", "layer-1/ffn_up.bin"]), damage=damages(header=40, size=172))
def test_any_damage_to_a_value_is_seen(folder: Path, name: str, damage: Damage) -> None:
    path = folder / name
    before = path.read_bytes()
    after = damage(before)
    path.write_bytes(after)
    key = (OUTSIDE, Stage.EMBEDDING) if "embedding" in name else (1, Stage.FFN_UP)
    value, error = read(folder, key)
    path.write_bytes(before)
    if value is None:
        assert after != before
        assert error == str(path)
    else:
        # Damage can put the bytes that were there.
        assert after == before
        assert same_bits(value, sample()[key])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages(header=1500, size=8000))
def test_a_damaged_sidecar_ends_in_a_reason_or_in_whole_values(folder: Path, damage: Damage) -> None:
    path = folder / "_aprjax.json"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    value, error = read(folder, (0, Stage.FFN_OUT))
    path.write_bytes(before)
    assert error is not None if value is None else same_bits(value, sample()[0, Stage.FFN_OUT])


def test_the_kind_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert is_aprt_folder(folder)
    (folder / "_aprjax.json").unlink()
    assert is_aprt_folder(folder)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"PK")
    assert not is_aprt_folder(tmp_path / "model")


def test_special_values_are_in_the_samples() -> None:
    assert np.isnan(SPECIAL.view(np.float32)).any()
    assert np.isinf(SPECIAL.view(np.float32)).any()
