"""Gradients equal finite differences, shares add up to the real change, and a planted fault gets all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.attribute.metric import metric_between
from aprjax.bisect.attribute.plot import write_waterfall
from aprjax.bisect.attribute.report import AttributeReport
from aprjax.bisect.attribute.reverse import Perturbed, base_shape
from aprjax.bisect.attribute.run import attribute
from aprjax.bisect.files import compare_files
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.patching import PatchedModel
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace import MemoryTrace
from aprjax.trace.sides import open_side

# Each test compiles the tiny model several times over, forwards and backwards: the quick suite has one of them.
thorough = pytest.mark.thorough

TOKENS = TokensReport("tokens", None, "none", (3, 5, 7, 11, 13, 2))
LAST = (len(TOKENS.ids) - 1,)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_tiny(tmp_path_factory.mktemp("attribute") / "base.apr", tiny_checkpoint(types={"": "Q4_K"}))


def scaled(checkpoint: Checkpoint, name: str, factor: float) -> Checkpoint:
    return with_tensor(checkpoint, name, checkpoint.tensors[name].decode() * factor)


def attributed(model: Checkpoint, ref: Checkpoint, arithmetics: tuple[str, str], **options: object) -> AttributeReport:
    sides = [Runner(c, preset(a)) for c, a in zip((model, ref), arithmetics, strict=True)]
    files = compare_files(model, ref)
    return attribute(*sides, tokens=TOKENS, positions=LAST, files=files, **options)  # pyright: ignore[reportArgumentType]


@thorough
def test_gradients_equal_finite_differences_at_every_stage(base: Checkpoint) -> None:
    model = PatchedModel(Runner(base, preset("float64")), TOKENS.ids, LAST, WeightSource(lambda name: False))
    logits = model.run()
    network = Perturbed(model, metric_between("margin", logits, logits, "float64"))
    length, generator = len(model.embedded), np.random.default_rng(0)
    zeros = {stage: np.zeros(base_shape(model, stage, length)) for stage in LAYER_STAGES}
    outside: dict[Stage, np.ndarray] = {}
    gradients = {
        (layer, stage): value
        for layer, found in network.gradients(lambda layer: outside if layer == OUTSIDE else zeros)
        for stage, value in found.items()
    }
    # Central differences in float64: the error falls with the step's square until rounding, 1e-16 of the value over
    # the step, takes over; 1e-4 lies between. The bound of 1e-6 is the issue's own.
    step = 1e-4
    places = [(layer, stage) for layer in range(CONFIG.num_layers) for stage in LAYER_STAGES]
    places += [(OUTSIDE, Stage.EMBEDDING), (OUTSIDE, Stage.FINAL_NORM), (OUTSIDE, Stage.LM_HEAD)]
    for layer, stage in places:
        gradient = gradients[layer, stage]
        direction = generator.normal(size=gradient.shape) * (gradient != 0)
        direction /= np.linalg.norm(direction)

        def moved(size: float, layer: int = layer, stage: Stage = stage, direction: np.ndarray = direction) -> float:
            def added(at: int) -> dict[Stage, np.ndarray]:
                if at == OUTSIDE:
                    return {stage: direction * size} if layer == OUTSIDE else {}
                return zeros | ({stage: direction * size} if at == layer else {})

            return network.value(added)

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6), (layer, stage)


@pytest.mark.parametrize("kind", ["margin", pytest.param("kl", marks=thorough)])
def test_a_planted_fault_gets_the_whole_change(base: Checkpoint, kind: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    report = attributed(scaled(base, name, 1.5), base, ("float32", "float32"), kind=kind, verify=1)
    assert report.verdict is Verdict.AGREE
    assert report.change != 0
    first = report.top(1)[0]
    assert (first.layer, first.stage, first.source) == (1, Stage.FFN_UP, "file")
    assert dict(first.tensors)[name] == pytest.approx(first.integrated)
    # The one error is the whole difference: its share, and both real runs, are the change.
    assert first.integrated == pytest.approx(report.change, rel=0.01)
    assert first.infects == pytest.approx(report.change, rel=1e-3)
    assert first.heals == pytest.approx(report.change, rel=1e-3)
    assert sum(abs(c.integrated) for c in report.contributions[1:]) < 0.01 * abs(report.change)
    # The same by what makes it; here the real runs exchange the tensor itself, not its errors.
    cause = report.causes[0]
    assert (cause.kind, cause.name) == ("tensor", name)
    assert cause.integrated == pytest.approx(first.integrated, rel=1e-6)
    assert cause.heals == pytest.approx(report.change, rel=1e-3)
    assert cause.infects == pytest.approx(report.change, rel=1e-3)
    assert cause.next_step
    assert sum(c.integrated for c in report.causes) == pytest.approx(sum(c.integrated for c in report.contributions))
    json.dumps(report.to_json(), allow_nan=False)
    write_waterfall(report, tmp_path / "waterfall.png")
    assert (tmp_path / "waterfall.png").read_bytes().startswith(b"\x89PNG")


@thorough
def test_the_first_order_estimate_of_kl_is_blind_and_the_path_is_not(base: Checkpoint) -> None:
    model = scaled(base, "model.layers.1.mlp.up_proj.weight", 1.5)
    report = attributed(model, base, ("float32", "float32"), kind="kl", verify=0)
    assert report.first_order_gap > 0.9
    assert report.gap < 0.01


@thorough
def test_drift_of_integer_arithmetic_adds_up(base: Checkpoint) -> None:
    report = attributed(base, base, ("llama.cpp", "float32"), steps=8, verify=3)
    assert report.gap < 0.01
    assert {c.source for c in report.contributions} == {"arithmetic"}
    for found in report.top(3):
        assert found.infects is not None
        assert found.heals is not None
        assert np.sign(found.infects) == np.sign(found.heals) == np.sign(found.integrated)


@thorough
def test_what_the_files_make_is_told_from_what_the_arithmetics_make(base: Checkpoint) -> None:
    names = ("model.layers.0.self_attn.k_proj.bias", "model.layers.2.mlp.down_proj.weight")
    model = scaled(scaled(base, names[0], 1.5), names[1], 1.02)
    model = replace(model, config=replace(model.config, rope_theta=5e5))
    mixed = attributed(model, base, ("llama.cpp", "float32"), steps=8, verify=4)
    pure = attributed(model, base, ("float32", "float32"), steps=8, verify=0)
    assert mixed.gap < 0.01
    found, alone = ({cause.name: cause for cause in report.causes} for report in (mixed, pure))
    assert {*names, "rope_theta", "activations quantized per 256 (Q8_K)"} <= {*found}
    assert {name for name, cause in alone.items() if cause.kind in ("tensor", "config")} == {*names, "rope_theta"}
    for name in (*names, "rope_theta"):
        # The file's part is that of the files under one arithmetic, but for the other side's inputs.
        assert found[name].integrated == pytest.approx(alone[name].integrated, abs=0.1 * abs(pure.change))
    checked = [cause for cause in mixed.causes if cause.heals is not None]
    assert len(checked) >= 2
    assert mixed.causes[0].infects is not None
    assert np.sign(mixed.causes[0].infects) == np.sign(mixed.causes[0].integrated)


def test_one_side_against_itself_has_nothing_to_attribute(base: Checkpoint) -> None:
    report = attributed(base, base, ("float32", "float32"), verify=0)
    assert (report.verdict, report.change, report.contributions) == (Verdict.AGREE, 0.0, ())


@thorough
def test_a_trace_is_a_side_too(base: Checkpoint) -> None:
    trace = open_side(str(base.path)).trace(list(TOKENS.ids))
    # llama.cpp's SwiGLU is one kernel: a trace without ffn_silu must do.
    values = {key: trace[key] for key in trace if key[1] is not Stage.FFN_SILU}
    traced = Traced(MemoryTrace(trace.info, values), base, preset(trace.info.arithmetic))
    runner = Runner(base, preset("float32"))
    report = attribute(traced, runner, tokens=TOKENS, positions=LAST, files=compare_files(base, base), verify=0)
    whole = attributed(base, base, (trace.info.arithmetic, "float32"), verify=0)
    assert report.change == pytest.approx(whole.change, rel=1e-5)
    assert report.gap < 0.01
    key = (OUTSIDE, Stage.LM_HEAD)
    short = Traced(MemoryTrace(trace.info, {k: v for k, v in values.items() if k != key}), base, traced.arithmetic)
    with pytest.raises(CheckpointError, match="no logits at all"):
        attribute(short, runner, tokens=TOKENS, positions=LAST, files=None, verify=0)


def test_other_dimensions_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.apr", tiny_checkpoint(replace(CONFIG, num_layers=2)))
    with pytest.raises(CheckpointError, match="num_layers"):
        attributed(other, base, ("float32", "float32"))
