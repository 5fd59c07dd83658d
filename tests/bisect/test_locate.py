"""Causes planted in a tiny model are found by patching at their place, and clean pairs have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.asked_pair import Question
from aprjax.bisect.confidence import Level
from aprjax.bisect.files import compare_files
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.locate.command import locate_sides
from aprjax.bisect.locate.report import LocateReport
from aprjax.bisect.locate.run import locate, noise_positions
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.parts import carrying_parts
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import MemoryTrace
from aprjax.trace.memory import save
from aprjax.trace.sides import open_side

TOKENS = TokensReport("tokens", None, "none", (3, 5, 7, 11, 13, 2))
EVERY = tuple(range(len(TOKENS.ids)))
FLOAT = preset("float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_tiny(tmp_path_factory.mktemp("locate") / "base.apr", tiny_checkpoint())


def scaled(checkpoint: Checkpoint, name: str, factor: float, rows: slice = slice(None)) -> Checkpoint:
    """One tensor, or some of its rows, times a factor."""
    values = np.array(checkpoint.tensors[name].decode())
    values[rows] *= factor
    return with_tensor(checkpoint, name, values)


def located(
    model: Checkpoint, ref: Checkpoint, *, arithmetics: tuple[str, str] = ("float32", "float32")
) -> LocateReport:
    sides = [Runner(c, preset(a)) for c, a in zip((model, ref), arithmetics, strict=True)]
    return locate(*sides, tokens=TOKENS, positions=EVERY, files=compare_files(model, ref))


@pytest.mark.parametrize(
    ("name", "rows", "place", "parts"),
    [
        ("model.layers.1.mlp.up_proj.weight", slice(None), (1, Stage.FFN_UP), None),
        ("model.layers.2.self_attn.q_proj.weight", slice(64, 128), (2, Stage.QKV_MATMUL), ("q head 1",)),
        ("model.layers.0.self_attn.v_proj.bias", slice(64, 128), (0, Stage.QKV_BIAS), ("v head 1",)),
        ("model.layers.1.mlp.gate_proj.weight", slice(256, 300), (1, Stage.FFN_GATE), ("256 to 511",)),
        ("model.embed_tokens.weight", slice(7, 8), (OUTSIDE, Stage.EMBEDDING), None),
        ("model.norm.weight", slice(0, 9), (OUTSIDE, Stage.FINAL_NORM), None),
        ("lm_head.weight", slice(0, 9), (OUTSIDE, Stage.LM_HEAD), None),
    ],
)
def test_a_planted_fault_is_located_and_proven(
    base: Checkpoint, name: str, rows: slice, place: tuple[int, Stage], parts: tuple[str, ...] | None
) -> None:
    model = scaled(base, name, 1.05, rows)
    report = located(model, base)
    assert report.verdict is Verdict.DIVERGENCE
    (fault,) = report.faults
    assert (fault.layer, fault.stage) == place
    assert name in fault.cause
    assert fault.before > 0
    assert fault.after == 0
    assert (None if fault.parts is None else fault.parts.names) == parts
    if fault.parts is not None:
        assert fault.parts.healed == 1.0
    if fault.infects is not None:
        # One fault from clean inputs: put into the reference it must do just what it does in the model.
        assert fault.infects == pytest.approx(report.drift, rel=1e-6)
    json.dumps(report.to_json(), allow_nan=False)


def test_the_place_is_the_linear_scan_s(base: Checkpoint) -> None:
    model = scaled(base, "model.layers.1.self_attn.o_proj.weight", 1.02)
    (fault,) = located(model, base).faults
    scan = layers(Runner(model, FLOAT), Runner(base, FLOAT), tokens=TOKENS, positions=EVERY).first_divergence
    assert scan is not None
    assert (scan.layer, scan.stage) == (fault.layer, fault.stage)


def test_two_faults_are_found_in_order(base: Checkpoint) -> None:
    model = scaled(base, "model.layers.0.mlp.down_proj.weight", 1.05)
    model = scaled(model, "model.layers.2.self_attn.k_proj.weight", 0.9)
    report = located(model, base)
    places = [(fault.layer, fault.stage) for fault in report.faults]
    assert places == [(0, Stage.FFN_OUT), (2, Stage.QKV_MATMUL)]


# Compiles every program for float64, too.
@pytest.mark.thorough
def test_a_fault_below_the_noise_is_named_as_not_located(base: Checkpoint) -> None:
    strong, weak = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    model = scaled(base, strong, 1.05)
    values = np.array(model.tensors[weak].decode())
    values[3, 5] += np.float32(1e-7)
    report = located(with_tensor(model, weak, values), base, arithmetics=("float32", "float64"))
    assert report.floor > 0
    assert [(fault.layer, fault.stage) for fault in report.faults] == [(2, Stage.FFN_UP)]
    (finding,) = [finding for finding in report.findings if finding.id == "not-located"]
    assert finding.message.startswith(f"tensors that differ, at no located place: {weak}. ")
    # Where all are located nothing is hidden.
    assert not any(finding.id == "not-located" for finding in located(scaled(base, strong, 1.05), base).findings)


@pytest.mark.parametrize(
    ("compared", "measured"),
    [((20,), range(13, 21)), ((3,), (1, 2, 3)), ((0,), (0,)), ((0, 5), (0, 1, 2, 3, 4, 5)), (range(9), range(9))],
)
def test_noise_is_measured_at_no_single_position(compared: Sequence[int], measured: Sequence[int]) -> None:
    assert noise_positions(tuple(compared)) == tuple(measured)


def test_two_faults_in_one_layer_are_found(base: Checkpoint) -> None:
    model = scaled(base, "model.layers.1.self_attn.q_proj.weight", 0.9)
    model = scaled(model, "model.layers.1.mlp.up_proj.weight", 1.05)
    places = [(fault.layer, fault.stage) for fault in located(model, base).faults]
    assert places == [(1, Stage.QKV_MATMUL), (1, Stage.FFN_UP)]


def test_a_config_key_is_one_cause_and_hides_no_other(base: Checkpoint) -> None:
    model = replace(base, config=replace(base.config, rope_theta=1e4))
    report = located(scaled(model, "model.layers.1.mlp.up_proj.weight", 1.05), base)
    assert [(fault.layer, fault.stage) for fault in report.faults] == [(0, Stage.Q_POST_ROPE), (1, Stage.FFN_UP)]
    assert "rope_theta" in report.faults[0].cause


@pytest.mark.parametrize(
    "arithmetics",
    [("float32", "float32"), pytest.param(("float32", "float64"), marks=pytest.mark.thorough)],
)
def test_a_clean_pair_has_nothing_to_locate(base: Checkpoint, arithmetics: tuple[str, str]) -> None:
    report = located(base, base, arithmetics=arithmetics)
    assert (report.verdict, report.faults, report.runs) == (Verdict.AGREE, (), ())


@pytest.mark.thorough
def test_under_noise_a_fault_is_still_located(base: Checkpoint) -> None:
    model = scaled(base, "model.layers.1.mlp.up_proj.weight", 1.05)
    report = located(model, base, arithmetics=("float32", "float64"))
    assert report.floor > 0
    assert [(fault.layer, fault.stage) for fault in report.faults] == [(1, Stage.FFN_UP)]
    assert report.faults[0].after <= report.floor


def with_massive_channel(checkpoint: Checkpoint) -> Checkpoint:
    """Channel 40 of layer 1's second norm is 300 times as large, and what reads it 300 times as small."""
    norm = "model.layers.1.post_attention_layernorm.weight"
    values = np.array(checkpoint.tensors[norm].decode())
    values[40] *= 300
    checkpoint = with_tensor(checkpoint, norm, values)
    for leaf in ("gate", "up"):
        name = f"model.layers.1.mlp.{leaf}_proj.weight"
        values = np.array(checkpoint.tensors[name].decode())
        values[:, 40] /= 300
        checkpoint = with_tensor(checkpoint, name, values)
    return checkpoint


@pytest.mark.thorough
def test_the_choice_of_an_arithmetic_is_named_with_what_it_spoils(tmp_path: Path) -> None:
    checkpoint = with_massive_channel(tiny_checkpoint(types={"proj": "Q4_K"}))
    checkpoint = write_tiny(tmp_path / "massive.apr", checkpoint)
    report = located(checkpoint, checkpoint, arithmetics=("llama.cpp", "float32"))
    assert report.verdict is Verdict.DIVERGENCE
    assert {(fault.layer, fault.stage) for fault in report.faults} <= {(1, Stage.FFN_GATE), (1, Stage.FFN_UP)}
    for fault in report.faults:
        assert "activations quantized per 256 (Q8_K) in the model (llama.cpp), activations not quantized" in fault.cause
        assert "channel 40 at position" in fault.cause
        assert fault.confidence.level is Level.STRONG
        assert "activations not quantized" in fault.next_step
    (choice,) = report.choices
    assert (choice.name, choice.model) == ("activations", "activations quantized per 256 (Q8_K)")
    # The other choices only round: without this one the two agree as far as float32 does.
    assert choice.after < 1e-3 * report.drift
    assert choice.infects == pytest.approx(report.drift, rel=0.1)


@pytest.mark.thorough
def test_a_trace_is_a_reference_too(base: Checkpoint) -> None:
    trace = open_side(str(base.path)).trace(list(TOKENS.ids))
    arithmetic = preset(trace.info.arithmetic)
    traced = Traced(trace, base, arithmetic)
    runner = Runner(scaled(base, "model.layers.1.mlp.up_proj.weight", 1.05), arithmetic)
    report = locate(runner, traced, tokens=TOKENS, positions=EVERY, files=None)
    assert [(fault.layer, fault.stage) for fault in report.faults] == [(1, Stage.FFN_UP)]
    assert report.faults[0].infects is None
    values = {key: np.array(trace[key]) for key in trace}
    values[2, Stage.FFN_UP][3, 5] = np.nan
    broken = replace(traced, trace=MemoryTrace(trace.info, values))
    with pytest.raises(CheckpointError, match=r"nan in ffn_up of layer 2, row 3, channel 5"):
        locate(runner, broken, tokens=TOKENS, positions=EVERY, files=None)


def test_other_dimensions_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.apr", tiny_checkpoint(replace(CONFIG, num_layers=2)))
    with pytest.raises(CheckpointError, match="num_layers"):
        located(other, base)


def test_a_trace_cannot_be_the_model_s_side(base: Checkpoint, tmp_path: Path) -> None:
    save(open_side(str(base.path)).trace(list(TOKENS.ids)), tmp_path / "trace.safetensors")
    with pytest.raises(CheckpointError, match="give the trace or engine as --ref"):
        locate_sides(str(tmp_path / "trace.safetensors"), str(base.path), Question())


def test_parts_are_the_fewest_that_carry_the_difference() -> None:
    difference = np.zeros((5, 512))
    difference[2, 300] = 1.0
    difference[3, 7] = 1e-6
    found = carrying_parts(Stage.FFN_GATE, difference, CONFIG)
    assert found is not None
    parts, mask = found
    assert (parts.names, parts.positions, parts.of) == (("256 to 511",), (2,), 2)
    assert mask.sum() == 256
    assert carrying_parts(Stage.FFN_GATE, np.ones((5, 512)), CONFIG) is None
    assert carrying_parts(Stage.FFN_GATE, np.zeros((5, 512)), CONFIG) is None
