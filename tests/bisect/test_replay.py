"""`replay` on tiny models: sound traces are explained, a fault is charged to its node and to no other."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bisect_traces import LAYERS, TOKENS, Fault, faulty_trace, sound_trace, tiny_file, trace_info
from rich.console import Console

from aprjax.bisect.replay.command import render
from aprjax.bisect.replay.judge import replay
from aprjax.bisect.replay.report import SCHEMA, NodeVerdict, ReplayReport
from aprjax.bisect.report import Verdict
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage
from aprjax.trace import MemoryTrace, Trace, save

LLAMA = PRESETS["llama.cpp"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def sound(file: Checkpoint) -> MemoryTrace:
    return sound_trace(file, LLAMA)


def with_values(trace: MemoryTrace, changes: dict[tuple[int, Stage], np.ndarray | None]) -> MemoryTrace:
    """Another dump of the same run: values exchanged, or left out where None is given."""
    values = {key: changes.get(key, value) for key, value in trace.values.items()}
    return replace(trace, values={key: value for key, value in values.items() if value is not None})


def unexplained(report: ReplayReport) -> list[tuple[int, Stage]]:
    return [(node.layer, node.stage) for node in report.unexplained]


def test_a_sound_trace_is_explained(file: Checkpoint, sound: MemoryTrace) -> None:
    report = replay(sound, file, LLAMA)
    assert report.verdict is Verdict.AGREE
    assert [(n.layer, n.stage) for n in report.nodes] == [
        (OUTSIDE, Stage.EMBEDDING),
        *((layer, stage) for layer in range(LAYERS) for stage in LAYER_STAGES),
        (OUTSIDE, Stage.FINAL_NORM),
        (OUTSIDE, Stage.LM_HEAD),
    ]
    assert all(node.verdict.explained for node in report.nodes)
    # Another program may fuse otherwise: half a dozen units in the last place.
    assert max(node.worst_row or 0 for node in report.nodes) < 3e-7
    assert report.findings == ()
    document = report.to_json()
    assert document["schema"] == SCHEMA
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert len(report.to_frame()) == len(report.nodes)
    assert "agree" in report._repr_html_()


def columns_dropped(file: Checkpoint, layer: int, name: str, source: Stage, columns: slice) -> Fault:
    """A product that leaves out some columns: by the decoded weights, not by the code under test."""

    def fault(value: np.ndarray, here: object) -> np.ndarray:
        matrix = file.tensors[f"model.layers.{layer}.{name}.weight"].decode()
        return value - here[source][:, columns] @ matrix[:, columns].T  # type: ignore[index]

    return fault


def head_unscaled(value: np.ndarray, here: object) -> np.ndarray:
    by_head = value.reshape(len(TOKENS), 4, -1)
    by_head[:, 2] *= 8  # the root of the head's width, 64
    return by_head.reshape(value.shape)


def coarse_exponential(value: np.ndarray, here: object) -> np.ndarray:
    scores = here[Stage.ATTN_SCORES].reshape(len(TOKENS), 4, -1)  # type: ignore[index]
    scores = np.where(np.tri(len(TOKENS), dtype=bool)[:, None], scores, -np.inf)
    # Schraudolph's exponential by a shifted exponent is as wrong as this: a few per cent.
    powers = np.where(np.isfinite(scores), (1 + (scores - scores.max(-1, keepdims=True)) / 64) ** 64, 0)
    return (powers / powers.sum(-1, keepdims=True)).reshape(value.shape).astype(np.float32)


def not_normalised(value: np.ndarray, here: object) -> np.ndarray:
    value = value.reshape(len(TOKENS), 4, -1)
    value[:, 1] *= np.linspace(1.5, 2.5, len(TOKENS), dtype=np.float32)[:, None]
    return value.reshape(len(TOKENS), -1)


def transposed(value: np.ndarray, here: object) -> np.ndarray:
    return value.reshape(len(TOKENS), 4, -1).transpose(0, 2, 1).reshape(value.shape)


def zeroed(value: np.ndarray, here: object) -> np.ndarray:
    value[3] = 0
    return value


def rectified(value: np.ndarray, here: object) -> np.ndarray:
    return np.maximum(here[Stage.FFN_GATE], 0)  # type: ignore[index]


def shifted_rows(value: np.ndarray, here: object) -> np.ndarray:
    return np.roll(value, 1, axis=0)


def one_channel(value: np.ndarray, here: object) -> np.ndarray:
    value[:, 77] *= np.float32(1.001)
    return value


def not_a_number(value: np.ndarray, here: object) -> np.ndarray:
    value[2, 100] = np.nan
    return value


FAULTS: dict[tuple[int, Stage], tuple[Fault | str, tuple[str, ...]]] = {
    (1, Stage.ATTN_SCORES): (head_unscaled, ("in head 2", "8 times", "root of the head's width")),
    (0, Stage.ATTN_SOFTMAX): (coarse_exponential, ("differ by",)),
    (1, Stage.ATTN_SOFTMAX): (not_normalised, ("in head 1", "add up to")),
    (0, Stage.ATTENTION): (transposed, ("read as [channel, head]",)),
    (1, Stage.FFN_NORM): (zeroed, ("position 3", "are zero")),
    (0, Stage.FFN_SILU): (rectified, ("differ by",)),
    (0, Stage.POST_FFN_RESIDUAL): (one_channel, ("channel 77", "1.001 times")),
    (1, Stage.Q_POST_ROPE): (transposed, ("read as [channel, head]",)),
    (OUTSIDE, Stage.FINAL_NORM): (one_channel, ("channel 77", "1.001 times")),
    (OUTSIDE, Stage.LM_HEAD): (shifted_rows, ("the file's at other positions",)),
    (0, Stage.FFN_GATE): ("lane", ("lane 3 of 8",)),
    (1, Stage.FFN_OUT): ("block", ("columns 256 to 511",)),
}


def fault_at(file: Checkpoint, at: tuple[int, Stage]) -> Fault:
    fault = FAULTS[at][0]
    if fault == "lane":
        return columns_dropped(file, at[0], "mlp.gate_proj", Stage.FFN_NORM, slice(3, None, 8))
    if fault == "block":
        return columns_dropped(file, at[0], "mlp.down_proj", Stage.FFN_SWIGL, slice(256, 512))
    assert not isinstance(fault, str)
    return fault


@pytest.mark.parametrize("at", FAULTS, ids=lambda at: f"{at[0]}-{at[1]}")
def test_a_kernel_fault_is_charged_to_its_node_alone(file: Checkpoint, at: tuple[int, Stage]) -> None:
    report = replay(faulty_trace(file, LLAMA, {at: fault_at(file, at)}), file, LLAMA)
    assert report.verdict is Verdict.DIVERGENCE
    assert unexplained(report) == [at]
    for words in FAULTS[at][1]:
        assert words in report.unexplained[0].reason
    assert report.reason.startswith("1 of ")
    assert str(at[1]) in report.reason


@pytest.mark.parametrize(
    "at",
    [(0, Stage.ATTN_NORM), (0, Stage.QKV_BIAS), (1, Stage.ATTENTION), (0, Stage.FFN_UP), (0, Stage.POST_FFN_RESIDUAL)],
    ids=lambda at: f"{at[0]}-{at[1]}",
)
def test_a_value_damaged_in_the_dump_alone_is_told_from_a_kernel_fault(
    file: Checkpoint, sound: MemoryTrace, at: tuple[int, Stage]
) -> None:
    damaged = sound[at].copy()
    damaged[:, ::8] = 0
    report = replay(with_values(sound, {at: damaged}), file, LLAMA)
    assert unexplained(report) == [at]
    reason = report.unexplained[0].reason
    assert "every channel that is 0 modulo 8" in reason
    assert "are zero" in reason
    followers = [node for node in report.nodes if str(at[1]) in node.through or "previous" in node.through]
    assert followers
    assert all(node.verdict.explained for node in followers)
    if at[1] is not Stage.POST_FFN_RESIDUAL:
        assert "the dump is wrong here" in reason


def test_two_faults_in_one_layer_are_both_named(file: Checkpoint) -> None:
    faults = {(0, Stage.ATTENTION): transposed, (0, Stage.FFN_SILU): rectified}
    assert unexplained(replay(faulty_trace(file, LLAMA, faults), file, LLAMA)) == list(faults)


def test_what_is_not_finite_is_charged_to_where_it_arose(file: Checkpoint) -> None:
    at = (0, Stage.FFN_UP)
    report = replay(faulty_trace(file, LLAMA, {at: not_a_number}), file, LLAMA)
    assert unexplained(report) == [at]
    assert "nan at position 2, channel 100" in report.unexplained[0].reason
    by_place = {(node.layer, node.stage): node for node in report.nodes}
    assert by_place[0, Stage.FFN_SWIGL].verdict is NodeVerdict.UNMEASURED
    assert "not finite" in by_place[0, Stage.FFN_SWIGL].reason
    assert by_place[0, Stage.FFN_SILU].verdict.explained
    assert json.dumps(report.to_json(), allow_nan=False)


def test_a_missing_stage_is_unmeasured_and_what_follows_it_is_judged_over_both(
    file: Checkpoint, sound: MemoryTrace
) -> None:
    lacking = {(layer, stage): None for layer in range(LAYERS) for stage in (Stage.FFN_SILU, Stage.POST_FFN_RESIDUAL)}
    faulty = faulty_trace(file, LLAMA, {(0, Stage.FFN_SWIGL): zeroed})
    for trace, expected in ((sound, []), (faulty, [(0, Stage.FFN_SWIGL)])):
        report = replay(with_values(trace, lacking), file, LLAMA)
        assert unexplained(report) == expected
        # A fault may lie in what was not measured: that is no agreement.
        assert report.verdict is (Verdict.DIVERGENCE if expected else Verdict.UNMEASURED)
        assert expected or report.reason.startswith(
            "the trace lacks 4 values, which were not measured: ffn_silu and post_ffn_residual of all"
        )
        by_place = {(node.layer, node.stage): node for node in report.nodes}
        for key in lacking:
            assert by_place[key].verdict is NodeVerdict.UNMEASURED
            assert by_place[key].mismatches is None
        assert by_place[0, Stage.FFN_SWIGL].through == ("ffn_silu",)
        assert by_place[1, Stage.ATTN_NORM].through == ("layer 0 post_ffn_residual",)
        assert "ffn_silu (2 layers)" in report.findings[0].message


def test_the_head_is_replayed_some_positions_at_a_time(
    file: Checkpoint, sound: MemoryTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = sound[OUTSIDE, Stage.LM_HEAD].copy()
    logits[9, 100] = -logits[9, 100]
    damaged = with_values(sound, {(OUTSIDE, Stage.LM_HEAD): logits})
    save(damaged, tmp_path / "saved.safetensors")
    whole = replay(damaged, file, LLAMA)
    monkeypatch.setattr("aprjax.qwen2.streaming.LOGIT_ROWS", 4)
    monkeypatch.setattr("aprjax.qwen2.streaming._LEAST_ROWS", 1)
    for trace in (damaged, Trace.load(tmp_path / "saved.safetensors")):
        report = replay(trace, file, LLAMA)
        assert unexplained(report) == [(OUTSIDE, Stage.LM_HEAD)]
        assert "position 9" in report.unexplained[0].reason
        for ours, theirs in zip(report.nodes[-2:], whole.nodes[-2:], strict=True):
            assert (ours.stage, ours.verdict, ours.count) == (theirs.stage, theirs.verdict, theirs.count)
            # Other shapes compile to other sums: a unit in the last place.
            assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)
            assert ours.rel_l2 == pytest.approx(theirs.rel_l2, rel=1e-3, abs=2e-7)
            assert ours.max_abs_at == theirs.max_abs_at or ours.stage is Stage.FINAL_NORM


def test_an_empty_trace_is_unmeasured(file: Checkpoint) -> None:
    report = replay(MemoryTrace(trace_info(file, "llama.cpp"), {}), file, LLAMA)
    assert report.verdict is Verdict.UNMEASURED
    assert report.verdict.exit_code == 3


AUTO = [PRESETS[name] for name in ("float32", "llama.cpp")]


def test_auto_names_the_arithmetic_of_every_stage_where_it_shows(file: Checkpoint, sound: MemoryTrace) -> None:
    report = replay(sound, file, AUTO)
    assert report.verdict is Verdict.AGREE
    matmuls = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
    assert {report.explained[stage] for stage in matmuls} == {"integer dots per 256"}
    assert "embedding" not in report.explained


def test_auto_finds_an_engine_that_mixes_arithmetics(file: Checkpoint) -> None:
    def float_product(value: np.ndarray, here: object) -> np.ndarray:
        matrix = file.tensors["model.layers.1.mlp.down_proj.weight"].decode()
        return here[Stage.FFN_SWIGL] @ matrix.T  # type: ignore[index]

    report = replay(faulty_trace(file, LLAMA, {(1, Stage.FFN_OUT): float_product}), file, AUTO)
    assert report.verdict is Verdict.AGREE
    assert report.explained["ffn_gate"] == "integer dots per 256"
    assert report.explained["ffn_out"] == "integer dots per 256 (layers 0) and float activations (layers 1)"
    assert unexplained(replay(faulty_trace(file, LLAMA, {(1, Stage.FFN_OUT): float_product}), file, LLAMA)) == [
        (1, Stage.FFN_OUT)
    ]


def test_a_trace_of_another_file_is_refused_unless_that_is_wanted(file: Checkpoint, sound: MemoryTrace) -> None:
    other = replace(sound, info=replace(sound.info, sha256="0" * 64))
    with pytest.raises(CheckpointError, match="0000000000000000"):
        replay(other, file, LLAMA)
    report = replay(other, file, LLAMA, force_file=True)
    assert report.verdict is Verdict.AGREE
    assert [finding.id for finding in report.findings] == ["file-differs"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": TOKENS[:-1]}, "positions"),
        ({"tokens": ()}, "names no tokens"),
        ({"positions": tuple(range(1, len(TOKENS) + 1))}, "expected values of all 11 positions"),
        ({"head_positions": (0, 99)}, "lie outside"),
        ({"head_positions": (7,)}, "expected shape"),
    ],
)
def test_other_tokens_and_positions_are_refused(
    file: Checkpoint, sound: MemoryTrace, change: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        replay(replace(sound, info=replace(sound.info, **change)), file, LLAMA)


def test_other_shapes_and_layers_are_refused(file: Checkpoint, sound: MemoryTrace) -> None:
    narrow = {(0, Stage.FFN_UP): sound[0, Stage.FFN_UP][:, :-1]}
    with pytest.raises(CheckpointError, match="expected shape"):
        replay(with_values(sound, narrow), file, LLAMA)
    more = replace(sound, values={**sound.values, (LAYERS, Stage.FFN_UP): sound[0, Stage.FFN_UP]})
    with pytest.raises(CheckpointError, match="the trace has a layer 2"):
        replay(more, file, LLAMA)


def test_the_command(
    file: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    saved = tmp_path / "faulty.safetensors"
    save(faulty_trace(file, LLAMA, {(0, Stage.FFN_SILU): rectified}), saved)
    target = tmp_path / "report.json"
    folder = tmp_path / "page"
    outputs = ["--json", str(target), "--report", str(folder)]
    assert main(["replay", str(saved), "--file", str(file.path), *outputs]) == 1
    document = json.loads(target.read_text())
    assert {path.name for path in folder.iterdir()} == {"index.html", "replay.json", "replay.png"}
    kept = json.loads((folder / "replay.json").read_text())
    assert kept.pop("made")["aprjax"]
    assert kept == document
    assert (folder / "replay.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "layer 0, ffn_silu" in page
    assert not re.search(r'src="|href="(?!#|replay\.(json|png)")', page), "a page that needs other files"
    assert [(n["layer"], n["stage"]) for n in document["unexplained"]] == [(0, "ffn_silu")]
    assert document["arithmetics"] == ["llama.cpp"]
    assert "layer 0, ffn_silu" in capsys.readouterr().out
    assert main(["replay", str(saved), "--file", str(tmp_path / "none.gguf")]) == 4
    assert main(["replay", str(saved), "--file", str(file.path), "--arithmetic", "abacus"]) == 2
    assert main(["replay", str(saved), "--file", str(file.path), "--tokens", "1,2"]) == 4
    assert main(["replay", str(saved), "--file", str(file.path), "--report", str(saved)]) == 4
    assert main(["replay", str(file.path), "--file", str(file.path)]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_the_table_fits_80_columns(file: Checkpoint, sound: MemoryTrace) -> None:
    stream = io.StringIO()
    render(replay(sound, file, LLAMA), Console(width=80, file=stream))
    text = stream.getvalue()
    assert "post_attn_residual" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "AGREE" in text
