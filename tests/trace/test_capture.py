"""What is kept of a run: the values are those of a whole run, and nothing else is computed or held."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint, write_tiny

from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.qwen2.model import Qwen2
from aprjax.trace import Trace
from aprjax.trace.capture import Capture, Selected
from aprjax.trace.sides import run_checkpoint
from aprjax.trace.streamed import StreamedRun

TOKENS = [5, 17, 40, 5, 90, 3, 7, 8]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_tiny(tmp_path_factory.mktemp("capture") / "model.apr", tiny_checkpoint())


@pytest.fixture(scope="module")
def whole(model: Checkpoint) -> dict[tuple[int, Stage], np.ndarray]:
    """Every value, by the model that holds all its layers."""
    _, values = Qwen2(model, PRESETS["float32"]).run_with_cache(TOKENS)
    return {key: np.asarray(value) for key, value in values.items()}


def test_a_streamed_run_has_the_bits_of_a_loaded_model(
    model: Checkpoint, whole: dict[tuple[int, Stage], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four positions at a time, so that the head comes in batches.
    monkeypatch.setattr("aprjax.qwen2.streaming.LOGIT_ROWS", 4)
    monkeypatch.setattr("aprjax.qwen2.streaming._LEAST_ROWS", 4)
    trace = run_checkpoint(model, TOKENS, PRESETS["float32"])
    assert set(trace) == set(whole)
    for key in trace:
        assert np.array_equal(trace[key], whole[key]), key


def test_chosen_values_are_those_of_a_whole_run(
    model: Checkpoint, whole: dict[tuple[int, Stage], np.ndarray], tmp_path: Path
) -> None:
    capture = Capture.parse(layers="-1,1", stages="lm_head,ffn_gate,attn_softmax", positions="3..5")
    trace = StreamedRun(model, TOKENS, PRESETS["float32"], capture).save(tmp_path / "some.safetensors")
    assert list(trace) == [(OUTSIDE, Stage.LM_HEAD), (1, Stage.ATTN_SOFTMAX), (1, Stage.FFN_GATE)]
    assert trace.info.positions == trace.info.head_positions == (3, 4, 5)
    assert trace.info.tokens == tuple(TOKENS)
    for key in trace:
        if key[1] is Stage.LM_HEAD:  # three rows are another product than eight: the order of sums may differ
            np.testing.assert_allclose(trace[key], whole[key][3:6], rtol=0, atol=1e-6 * np.abs(whole[key]).max())
        else:
            assert np.array_equal(trace[key], whole[key][3:6]), key


@pytest.mark.parametrize(
    ("layers", "stages", "loaded"), [("1", None, [0, 1]), (None, "embedding", []), ("0", None, [0])]
)
def test_what_comes_behind_is_not_run(
    model: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    layers: str | None,
    stages: str | None,
    loaded: list[int],
) -> None:
    from aprjax.trace import streamed

    seen: list[int] = []
    real = streamed.load_layer
    monkeypatch.setattr(
        streamed, "load_layer", lambda file, index, pack: (seen.append(index), real(file, index, pack))[1]
    )
    monkeypatch.setattr(streamed, "head_tensor", lambda file: pytest.fail("the head is not asked for"))
    capture = Capture.parse(layers=layers, stages=stages)
    trace = StreamedRun(model, TOKENS, PRESETS["float32"], capture).collect()
    assert seen == loaded
    assert {layer for layer, _ in trace} == ({loaded[-1]} if loaded else {OUTSIDE})


def test_a_recorded_trace_is_cut(model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "all.safetensors", tmp_path / "some.safetensors"
    StreamedRun(model, TOKENS, PRESETS["float32"]).save(source)
    asked = ["--layers", "0..1", "--stages", "ffn_out", "--positions", "last", "--save", str(target), "--json", "-"]
    assert main(["trace", str(source), *asked]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [(value["layer"], value["stage"], value["shape"][0]) for value in summary["values"]] == [
        (0, "ffn_out", 1),
        (1, "ffn_out", 1),
    ]
    before, after = Trace.load(source), Trace.load(target)
    assert after.info.positions == (7,)
    for key in after:
        assert np.array_equal(after[key], before[key][7:])
    with pytest.raises(CheckpointError, match="none of the layers and stages"):
        Selected(after, Capture.parse(layers="2"))
    with pytest.raises(CheckpointError, match="none of the positions"):
        Selected(after, Capture.parse(positions="0..3"))


def test_layers_saves_what_is_asked_for_and_compares_all(
    model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sides = ["layers", "--model", str(model.path), "--ref", str(model.path), "--tokens", ",".join(map(str, TOKENS))]
    asked = ["--arithmetic", "float32", "--save-trace", str(tmp_path / "t"), "--json", "-"]
    chosen = ["--save-layers", "2,-1", "--save-stages", "ffn_out,lm_head"]
    assert main([*sides, *asked, *chosen]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in report["layers"]] == [-1, 0, 1, 2]
    for side in ("model", "ref"):
        assert list(Trace.load(tmp_path / f"t.{side}.safetensors")) == [(-1, Stage.LM_HEAD), (2, Stage.FFN_OUT)]
    assert main([*sides, "--save-layers", "1"]) == 2
    assert "--save-trace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "ended"),
    [
        ("--layers=1..0", (2, "expected layers")),
        ("--layers=one", (2, "expected layers")),
        ("--stages=ffn_gates", (2, "'ffn_gates'")),
        ("--positions=3-5", (2, "expected last, all")),
        ("--layers=3", (4, "the model has 3")),
        ("--positions=0..8", (4, "8 tokens")),
    ],
)
def test_wrong_choices(
    model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture, choice: str, ended: tuple[int, str]
) -> None:
    code, words = ended
    target = tmp_path / "trace.safetensors"
    command = ["trace", str(model.path), "--tokens", ",".join(map(str, TOKENS)), "--save", str(target), choice]
    assert main(command) == code
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in shown
    assert list(tmp_path.iterdir()) == []
