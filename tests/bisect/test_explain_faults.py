"""`explain` on traces of tiny models: planted faults are named, fitted and kept apart; clean traces stay clean."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bisect_traces import LAYERS, TYPES, Fault, faulty_trace, sound_trace, tiny_file, trace_info
from explain_faults import (
    COOLER,
    LONG_MASK,
    NO_MASK,
    WINDOW_OF_FOUR,
    added_twice,
    exchanged,
    gelu,
    in_every_layer,
    interleaved_keys,
    mirrored,
    nothing_added,
    scaled,
    stale_values,
    without_v_bias,
)
from rich.console import Console
from tiny import CONFIG, tiny_checkpoint, write_tiny

from aprjax.bisect.confidence import Level
from aprjax.bisect.explain.evaluation import Applied, Evaluation
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Parameter
from aprjax.bisect.explain.programs import derivatives
from aprjax.bisect.explain.render import render
from aprjax.bisect.explain.report import SCHEMA, ExplainReport
from aprjax.bisect.explain.run import explain
from aprjax.bisect.replay.judge import replay
from aprjax.bisect.report import Verdict
from aprjax.checkpoint.types import Checkpoint
from aprjax.cli import main
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.trace import MemoryTrace, save

LLAMA = PRESETS["llama.cpp"]
NodeFaults = Mapping[tuple[int, Stage], Fault]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("explain"))


@pytest.fixture(scope="module")
def sound(file: Checkpoint) -> MemoryTrace:
    return sound_trace(file, LLAMA)


def explained(file: Checkpoint, trace: MemoryTrace, **options: object) -> ExplainReport:
    """The search alone: identity has tests of its own."""
    return explain(trace, file, LLAMA, identity=(), max_faults=16, **options)  # type: ignore[arg-type]


def run_with(file: Checkpoint, **config: object) -> MemoryTrace:
    """What another config computes from the same weights, claiming to be the file's own run."""
    return sound_trace(replace(file, config=replace(file.config, **config)), LLAMA)  # type: ignore[arg-type]


def ids(report: ExplainReport) -> list[str]:
    return [found.id for found in report.explanations]


def number(report: ExplainReport, slug: str, name: str) -> Parameter:
    parameter = next(found for found in report.explanations if found.id == slug).parameters[name]
    assert isinstance(parameter, Parameter)
    return parameter


def test_nothing_is_to_be_explained_in_a_sound_trace(file: Checkpoint, sound: MemoryTrace) -> None:
    report = explained(file, sound)
    assert report.verdict is Verdict.AGREE
    assert report.verdict.exit_code == 0
    assert (report.explanations, report.unexplained) == ((), ())
    document = report.to_json()
    assert document["schema"] == SCHEMA
    assert document["explained"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["float32", "llama.cpp-f16", "llama.cpp-flash-exact", "realizar", "q8_1"])
def test_clean_traces_are_clean_under_every_kind_of_arithmetic(file: Checkpoint, name: str) -> None:
    report = explain(sound_trace(file, PRESETS[name]), file, PRESETS[name])
    assert report.verdict is Verdict.AGREE, report.reason
    assert report.identity == ()


@pytest.mark.parametrize(
    ("theta", "eps"), [(123456.0, 3.7e-5), pytest.param(10000.0, 1e-5, marks=pytest.mark.thorough)]
)
def test_theta_and_epsilon_are_fitted_from_one_trace(file: Checkpoint, theta: float, eps: float) -> None:
    report = explained(file, run_with(file, rope_theta=theta, rms_norm_eps=eps))
    assert sorted(ids(report)) == ["rms-eps", "rope-theta"]
    assert report.explained
    fitted_theta, fitted_eps = number(report, "rope-theta", "rope_theta"), number(report, "rms-eps", "rms_norm_eps")
    assert (fitted_theta.file, fitted_eps.file) == (1e6, 1e-6)
    for fitted, true in ((fitted_theta, theta), (fitted_eps, eps)):
        # Far better than the 0.1 % asked for, and the error that is stated covers what is missed.
        assert fitted.value == pytest.approx(true, rel=2e-6)
        assert fitted.error is not None
        assert abs(fitted.value - true) <= fitted.error <= 3e-4 * true
    for found in report.explanations:
        assert found.everywhere
        assert found.before > 1e-2
        assert found.residual < 3e-7
        assert found.confidence.level is Level.STRONG
        assert "convert the model again" in found.next_step


@pytest.mark.thorough
def test_a_pairing_and_a_base_at_one_node_are_found_as_a_pair(file: Checkpoint) -> None:
    report = explained(file, run_with(file, rope_theta=20000.0, rope_pairing="norm"))
    assert sorted(ids(report)) == ["rope-pairing-norm", "rope-theta"]
    assert number(report, "rope-theta", "rope_theta").value == pytest.approx(20000, rel=1e-5)
    assert report.explained


def many(file: Checkpoint) -> dict[str, tuple[dict[str, tuple[str, int]], NodeFaults]]:
    """Some traces with several faults each, and by right hypothesis the stage and how many nodes it must explain."""
    one = {
        **in_every_layer(Stage.ATTN_SCORES, scaled(8.0)),
        **in_every_layer(Stage.ATTN_SOFTMAX, NO_MASK),
        **in_every_layer(Stage.ATTENTION, stale_values),
        **in_every_layer(Stage.FFN_SILU, gelu),
        **in_every_layer(Stage.POST_FFN_RESIDUAL, added_twice),
        (OUTSIDE, Stage.FINAL_NORM): scaled(1.5),
    }
    two = {
        **{(layer, Stage.QKV_BIAS): without_v_bias(file, layer) for layer in range(LAYERS)},
        **in_every_layer(Stage.ATTN_SCORES, scaled(8 * 0.113)),
        **in_every_layer(Stage.ATTN_SOFTMAX, WINDOW_OF_FOUR),
        (1, Stage.ATTN_OUT): scaled(0.0),
        (0, Stage.FFN_SWIGL): exchanged,
        (1, Stage.POST_FFN_RESIDUAL): nothing_added,
    }
    three = {
        (1, Stage.ATTN_SCORES): interleaved_keys(0.77),
        (0, Stage.ATTN_SOFTMAX): COOLER,
        (1, Stage.ATTN_SOFTMAX): LONG_MASK,
    }
    return {
        "everywhere": (
            {
                "attn-scale-missing": ("attn_scores", 2),
                "mask-missing": ("attn_softmax", 2),
                "value-cache-behind": ("attention", 2),
                "activation-gelu": ("ffn_silu", 2),
                "ffn-output-doubled": ("post_ffn_residual", 2),
                "weights-scaled": ("final_norm", 1),
            },
            one,
        ),
        "here and there": (
            {
                "bias-missing-v": ("qkv_bias", 2),
                "attn-scale": ("attn_scores", 2),
                "sliding-window": ("attn_softmax", 2),
                "weights-zeroed": ("attn_out", 1),
                "gate-up-exchanged": ("ffn_swigl", 1),
                "ffn-residual-missing": ("post_ffn_residual", 1),
            },
            two,
        ),
        "two at one node": (
            {
                "kv-heads-interleaved": ("attn_scores", 1),
                "attn-scale": ("attn_scores", 1),
                "softmax-temperature": ("attn_softmax", 1),
                "mask-too-long": ("attn_softmax", 1),
            },
            three,
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("everywhere", marks=pytest.mark.thorough),
        "here and there",
        pytest.param("two at one node", marks=pytest.mark.thorough),
    ],
)
def test_faults_of_kernels_are_told_apart(file: Checkpoint, name: str) -> None:
    expected, faults = many(file)[name]
    report = explained(file, faulty_trace(file, LLAMA, faults))
    found = {one.id: (str(one.nodes[0][1]), len(one.nodes)) for one in report.explanations}
    assert found == expected
    assert report.explained
    assert report.verdict.exit_code == 1
    assert all(one.residual <= one.tolerance < 1e-5 for one in report.explanations)
    if name == "here and there":
        scale = number(report, "attn-scale", "score_scale")
        assert scale.value == pytest.approx(0.113, rel=1e-5)
        assert scale.file == 0.125
        local = {one.id for one in report.explanations if not one.everywhere}
        assert {"gate-up-exchanged", "ffn-residual-missing"} <= local
    if name == "two at one node":
        assert number(report, "softmax-temperature", "factor").value == pytest.approx(0.9, rel=1e-5)
        assert "together with" in next(o for o in report.explanations if o.id == "attn-scale").confidence.basis


def test_what_nothing_explains_is_said_with_what_was_excluded(file: Checkpoint) -> None:
    faults = {**in_every_layer(Stage.ATTN_NORM, mirrored), (0, Stage.FFN_SILU): gelu}
    report = explained(file, faulty_trace(file, LLAMA, faults))
    assert ids(report) == ["activation-gelu"]
    assert not report.explained
    assert [left.node for left in report.unexplained] == [(0, Stage.ATTN_NORM), (1, Stage.ATTN_NORM)]
    excluded = {tried.id: tried.residual for tried in report.unexplained[0].excluded}
    assert {"rms-eps", "norm-missing", "layer-norm", "scaled-attn_norm"} <= set(excluded)
    assert min(excluded.values()) > 0.1
    assert list(excluded.values()) == sorted(excluded.values())
    assert "stay unexplained" in report.reason
    stream = io.StringIO()
    render(report, Console(file=stream, width=100))
    assert "hypotheses excluded" in stream.getvalue()
    assert len(report.to_frame()) == 3
    assert report.top(1)[0]["id"] == "activation-gelu"


def only_outputs(trace: MemoryTrace) -> MemoryTrace:
    """As a folder of layer outputs has it."""
    kept = (Stage.POST_FFN_RESIDUAL, Stage.LM_HEAD)
    return replace(trace, values={key: value for key, value in trace.values.items() if key[1] in kept})


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("slug", "faults"),
    [
        ("activation-gelu", in_every_layer(Stage.FFN_SILU, gelu)),
        ("mask-missing", in_every_layer(Stage.ATTN_SOFTMAX, NO_MASK)),
        ("attn-scale", in_every_layer(Stage.ATTN_SCORES, scaled(8 * 0.113))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layer_outputs_are_enough(file: Checkpoint, slug: str, faults: NodeFaults) -> None:
    report = explained(file, only_outputs(faulty_trace(file, LLAMA, faults)))
    assert ids(report) == [slug]
    assert report.explanations[0].nodes == tuple((layer, Stage.POST_FFN_RESIDUAL) for layer in range(LAYERS))
    if slug == "attn-scale":
        found = report.explanations[0]
        assert number(report, slug, "score_scale").value == pytest.approx(0.113, rel=1e-3)
        # Of the scale of queries, of keys and of scores the layer's output knows only the product.
        assert found.confidence.level is Level.WEAK
        assert {"softmax-temperature", "scaled-q_post_rope"} <= {rival.id for rival in found.rivals}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("key", "slug", "true"), [("rope_theta", "rope-theta", 123456.0), ("rms_norm_eps", "rms-eps", 3.7e-5)]
)
def test_config_numbers_are_fitted_through_whole_layers(file: Checkpoint, key: str, slug: str, true: float) -> None:
    report = explained(file, only_outputs(run_with(file, **{key: true})))
    assert ids(report) == [slug]
    assert number(report, slug, key).value == pytest.approx(true, rel=1e-3)


# By node: the stages that a number goes into, how it does, and where the derivative is taken.
NUMBERS = {
    (0, Stage.Q_POST_ROPE): ((Stage.Q_POST_ROPE, Stage.K_POST_ROPE), lambda v, x: replace(v, theta=x), 123456.0),
    (0, Stage.ATTN_NORM): ((Stage.ATTN_NORM,), lambda v, x: replace(v, eps=x), 3e-5),
    (1, Stage.ATTN_SOFTMAX): ((Stage.ATTN_SCORES,), lambda v, x: replace(v, score_scale=x), 0.2),
    (0, Stage.ATTN_SOFTMAX): ((Stage.ATTN_SCORES,), lambda v, x: replace(v, score_cap=x), 3.0),
    (1, Stage.POST_FFN_RESIDUAL): ((Stage.FFN_SWIGL,), lambda v, x: replace(v, factors={Stage.FFN_SWIGL: x}), 1.4),
    (0, Stage.POST_FFN_RESIDUAL): ((Stage.POST_FFN_RESIDUAL,), lambda v, x: replace(v, ffn_branch=x), 0.7),
}


@pytest.mark.thorough
def test_gradients_are_those_of_finite_differences(file: Checkpoint) -> None:
    # Without some stages, so that derivatives go on through products.
    trace = sound_trace(file, PRESETS["float64"])
    lacking = (Stage.ATTN_SCORES, Stage.QKV_BIAS, Stage.FFN_SILU, Stage.FFN_SWIGL, Stage.FFN_OUT)
    trace = replace(trace, values={key: value for key, value in trace.values.items() if key[1] not in lacking})
    arithmetic = PRESETS["float64"]
    evidence = Evidence(trace, file, arithmetic, replay(trace, file, arithmetic))
    for node, (stages, shift, at) in NUMBERS.items():

        def moved(value: float) -> Evaluation:
            change = lambda variant: shift(variant, value)  # noqa: B023, E731
            return evidence.base.with_change(Applied(change, frozenset(stages)))  # noqa: B023

        change = Applied(lambda variant: variant, frozenset(stages))
        (slope,) = derivatives(moved(at), node, ((shift, change),), np.array([at]))
        step = 1e-5 * at
        difference = (moved(at + step).value(node) - moved(at - step).value(node)) / (2 * step)
        assert np.linalg.norm(slope) > 0
        assert np.linalg.norm(slope - difference) <= 1e-6 * np.linalg.norm(difference), node


def test_the_command(
    file: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    saved, target = tmp_path / "faulty.safetensors", tmp_path / "report.json"
    save(faulty_trace(file, LLAMA, in_every_layer(Stage.FFN_SILU, gelu)), saved)
    outputs = ["--json", str(target), "--report", str(tmp_path / "page")]
    assert main(["explain", str(saved), "--file", str(file.path), *outputs]) == 1
    document = json.loads(target.read_text())
    assert [found["id"] for found in document["explanations"]] == ["activation-gelu"]
    assert document["explanations"][0]["layers"] == [0, 1]
    assert (tmp_path / "page" / "index.html").is_file()
    text = capsys.readouterr().out
    assert "1. the feed-forward's activation is GELU instead of SiLU" in text
    assert "next: " in text
    assert main(["explain", str(saved), "--file", str(tmp_path / "none.gguf")]) == 4
    assert main(["explain", str(saved), "--file", str(file.path), "--arithmetic", "abacus"]) == 2
    assert main(["explain", str(file.path), "--file", str(file.path)]) == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_checkpoint_that_runs_here_is_explained_by_another(
    file: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    config = replace(CONFIG, num_layers=LAYERS, rope_theta=50000.0)
    other = write_tiny(tmp_path / "other.apr", tiny_checkpoint(config, types=TYPES))
    target = tmp_path / "report.json"
    arguments = ["--file", str(file.path), "--tokens", "5,17,300,5,256,41,99,3,250,12,7", "--json", str(target)]
    assert main(["explain", str(other.path), *arguments]) == 1
    (found,) = json.loads(target.read_text())["explanations"]
    assert found["id"] == "rope-theta"
    assert found["parameters"]["rope_theta"]["value"] == pytest.approx(50000, rel=1e-5)


def test_bad_input_is_refused_or_unmeasured(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    empty = MemoryTrace(trace_info(file, "llama.cpp"), {})
    assert explained(file, empty).verdict.exit_code == 3
    saved = tmp_path / "sound.safetensors"
    save(sound, saved)
    deeper = write_tiny(tmp_path / "deeper.apr", tiny_checkpoint(replace(CONFIG, num_layers=1), types=TYPES))
    for arguments in (["--force-file"], []):
        assert main(["explain", str(saved), "--file", str(deeper.path), *arguments]) == 4
    broken = sound[0, Stage.FFN_UP].copy()
    broken[2, 100] = np.nan
    report = explained(file, replace(sound, values={**sound.values, (0, Stage.FFN_UP): broken}))
    assert report.verdict is Verdict.DIVERGENCE
    assert [left.node for left in report.unexplained] == [(0, Stage.FFN_UP)]
    assert "nan at position 2, channel 100" in report.unexplained[0].reason
    assert json.dumps(report.to_json(), allow_nan=False)
