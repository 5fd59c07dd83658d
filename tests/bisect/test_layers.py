"""`layers` on tiny models: every planted fault at its site, and clean pairs clean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, random_values, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.report import LayersReport, Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage

TOKENS = (5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7)
TYPES = {"": "Q4_K", "v_proj": "Q6_K", "down_proj": "Q6_K", "lm_head": "Q6_K"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Checkpoint:
    return write_tiny(folder / "ref.apr", tiny_checkpoint(types=TYPES))


def compare(
    model: Checkpoint,
    ref: Checkpoint,
    *,
    arithmetics: tuple[str, str] = ("llama.cpp", "llama.cpp"),
    positions: tuple[int, ...] = tuple(range(len(TOKENS))),
    tokens: tuple[int, ...] = TOKENS,
) -> LayersReport:
    runners = [Runner(side, PRESETS[name]) for side, name in zip((model, ref), arithmetics, strict=True)]
    return layers(*runners, tokens=TokensReport("test", None, "none", tokens), positions=positions)


def changed(folder: Path, reference: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Checkpoint:
    values = change(reference.tensors[name].decode().copy())
    return write_tiny(folder / "changed.apr", with_tensor(reference, name, values))


def place(report: LayersReport) -> tuple[int, Stage] | None:
    first = report.first_divergence
    return None if first is None else (first.layer, first.stage)


@pytest.mark.parametrize("name", ["float32", "float64", "llama.cpp"])
def test_a_clean_pair_agrees_to_the_bit(folder: Path, reference: Checkpoint, name: str) -> None:
    twin = write_tiny(folder / "twin.apr", tiny_checkpoint(types=TYPES))
    report = compare(twin, reference, arithmetics=(name, name))
    assert report.verdict is Verdict.AGREE
    assert report.first_divergence is None
    assert report.findings[0].message.startswith("The two files hold byte-identical blocks")
    assert [layer.layer for layer in report.layers] == [OUTSIDE, 0, 1, 2]
    for layer in report.layers:
        stages = (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD) if layer.layer == OUTSIDE else LAYER_STAGES
        assert tuple(layer.stages) == stages
        for stage in layer.stages.values():
            assert (stage.local_rel_l2, stage.distance.rel_l2, stage.distance.max_abs) == (0.0, 0.0, 0.0)
            assert stage.distance.std_ratio == 1.0
    assert len(report.margins) == len(TOKENS)
    assert not any(m.flip or m.kl for m in report.margins)
    assert report.noise["layers"] == []


# Independent of the detecting code: what is changed, and where a reader of the paper expects it to show.
TENSOR_FAULTS = {
    "model.layers.1.input_layernorm.weight": (1, Stage.ATTN_NORM),
    "model.layers.1.self_attn.q_proj.weight": (1, Stage.QKV_MATMUL),
    "model.layers.0.self_attn.k_proj.weight": (0, Stage.QKV_MATMUL),
    "model.layers.2.self_attn.v_proj.weight": (2, Stage.QKV_MATMUL),
    "model.layers.2.self_attn.q_proj.bias": (2, Stage.QKV_BIAS),
    "model.layers.1.self_attn.k_proj.bias": (1, Stage.QKV_BIAS),
    "model.layers.0.self_attn.v_proj.bias": (0, Stage.QKV_BIAS),
    "model.layers.1.self_attn.o_proj.weight": (1, Stage.ATTN_OUT),
    "model.layers.0.post_attention_layernorm.weight": (0, Stage.FFN_NORM),
    "model.layers.2.mlp.gate_proj.weight": (2, Stage.FFN_GATE),
    "model.layers.1.mlp.up_proj.weight": (1, Stage.FFN_UP),
    "model.layers.0.mlp.down_proj.weight": (0, Stage.FFN_OUT),
    "model.norm.weight": (OUTSIDE, Stage.FINAL_NORM),
    "lm_head.weight": (OUTSIDE, Stage.LM_HEAD),
    "model.embed_tokens.weight": (OUTSIDE, Stage.EMBEDDING),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_a_changed_tensor_is_found_at_its_stage(folder: Path, reference: Checkpoint, name: str) -> None:
    model = changed(folder, reference, name, lambda v: v * np.float32(1.05))
    report = compare(model, reference)
    assert report.verdict is Verdict.DIVERGENCE
    assert place(report) == TENSOR_FAULTS[name]
    assert report.first_divergence is not None
    assert name in report.first_divergence.cause
    assert any(f.id == "tensor-differs" and f.tensor == name for f in report.findings)


CONSTANT_FAULTS = {
    "rope_theta": (1e4, (0, Stage.Q_POST_ROPE)),
    "rope_pairing": ("norm", (0, Stage.Q_POST_ROPE)),
    "rms_norm_eps": (1e-5, (0, Stage.ATTN_NORM)),
}


@pytest.mark.parametrize("key", CONSTANT_FAULTS)
@pytest.mark.parametrize("arithmetic", ["float32", pytest.param("llama.cpp", marks=pytest.mark.thorough)])
def test_a_changed_constant_is_found_at_its_stage(
    folder: Path, reference: Checkpoint, key: str, arithmetic: str
) -> None:
    value, expected = CONSTANT_FAULTS[key]
    config = replace(CONFIG, **{key: value})
    model = write_tiny(folder / "config.apr", replace(tiny_checkpoint(types=TYPES), config=config))
    report = compare(model, reference, arithmetics=(arithmetic, arithmetic))
    assert place(report) == expected
    assert report.first_divergence is not None
    assert report.first_divergence.cause.startswith(f"{key} is {value!r} in the model and ")


def test_what_follows_a_fault_is_inherited_and_not_accused(folder: Path, reference: Checkpoint) -> None:
    report = compare(changed(folder, reference, "model.layers.1.mlp.up_proj.weight", lambda v: v * 1.1), reference)
    after = [stage for layer in report.layers if layer.layer == 2 for stage in layer.stages.values()]
    assert all(stage.distance.rel_l2 > 1e-3 for stage in after)
    for stage in after:
        assert stage.local_rel_l2 == 0.0 or (stage.tolerance is not None and stage.local_rel_l2 <= stage.tolerance)


def test_the_first_of_two_faults_in_execution_order_is_named(folder: Path, reference: Checkpoint) -> None:
    twice = changed(folder, reference, "model.layers.1.self_attn.o_proj.weight", lambda v: v * 1.1)
    model = with_tensor(
        twice,
        "model.layers.1.mlp.down_proj.weight",
        twice.tensors["model.layers.1.mlp.down_proj.weight"].decode() * 1.1,
    )
    assert place(compare(write_tiny(folder / "two.apr", model), reference)) == (1, Stage.ATTN_OUT)


def test_a_difference_that_the_tokens_do_not_touch_leaves_agreement(folder: Path, reference: Checkpoint) -> None:
    def overwrite(values: np.ndarray) -> np.ndarray:
        values[400] = values[1]
        return values

    assert 400 not in TOKENS
    model = changed(folder, reference, "model.embed_tokens.weight", overwrite)
    report = compare(model, reference)
    assert report.verdict is Verdict.AGREE
    assert "nowhere that these tokens touch" in report.reason
    assert any(f.id == "tensor-differs" for f in report.findings)
    touched = compare(model, reference, tokens=(*TOKENS, 400), positions=(11,))
    assert place(touched) == (OUTSIDE, Stage.EMBEDDING)


def test_only_the_declared_positions_are_compared(folder: Path, reference: Checkpoint) -> None:
    def overwrite(values: np.ndarray) -> np.ndarray:
        values[TOKENS[9]] += 1
        return values

    model = changed(folder, reference, "model.embed_tokens.weight", overwrite)
    before, all_positions = compare(model, reference, positions=(0, 1, 2)), compare(model, reference)
    assert before.verdict is Verdict.AGREE
    assert [m.position for m in before.margins] == [0, 1, 2]
    embedding = all_positions.layers[0].stages[Stage.EMBEDDING]
    assert embedding.distance.max_abs_at[0] == 9
    assert place(all_positions) == (OUTSIDE, Stage.EMBEDDING)
    with pytest.raises(ValueError, match="do not all lie within the 11 tokens"):
        compare(model, reference, positions=(11,))


@pytest.mark.thorough
def test_positions_beyond_one_batch_of_logits_are_all_measured(folder: Path, reference: Checkpoint) -> None:
    generator = np.random.default_rng(0)
    tokens = tuple(int(t) for t in generator.integers(0, 500, 140))

    def last_rows(values: np.ndarray) -> np.ndarray:
        values[490:] *= 1.01
        return values

    model = changed(folder, reference, "lm_head.weight", last_rows)
    report = compare(model, reference, tokens=tokens, positions=tuple(range(140)))
    assert [m.position for m in report.margins] == list(range(140))
    assert report.layers[0].stages[Stage.LM_HEAD].distance.count == 140 * CONFIG.vocab_size
    assert place(report) == (OUTSIDE, Stage.LM_HEAD)


def test_nan_in_the_model_is_a_divergence_with_its_position(folder: Path, reference: Checkpoint) -> None:
    def poison(values: np.ndarray) -> np.ndarray:
        values[3, 9] = np.nan
        return values

    name = "model.layers.1.mlp.up_proj.weight"
    values = poison(reference.tensors[name].decode().copy())
    model = write_tiny(folder / "nan.apr", with_tensor(reference, name, values, "F32"))
    report = compare(model, reference, arithmetics=("float32", "float32"))
    assert place(report) == (1, Stage.FFN_UP)
    assert "the model's value is nan at position 0, channel 3" in report.reason
    turned = compare(reference, model, arithmetics=("float32", "float32"))
    assert turned.verdict is Verdict.UNMEASURED
    assert turned.verdict.exit_code == 3
    assert "layer 1, ffn_up: the reference's value is nan" in turned.reason


def test_other_dimensions_are_unmeasured_and_say_which(folder: Path, reference: Checkpoint) -> None:
    small = write_tiny(folder / "small.apr", tiny_checkpoint(replace(CONFIG, num_layers=2)))
    report = compare(small, reference)
    assert report.verdict is Verdict.UNMEASURED
    assert "num_layers (2 and 3)" in report.reason
    assert report.layers == ()


def test_two_arithmetics_on_one_file_agree_or_tie_and_say_so(reference: Checkpoint) -> None:
    report = compare(reference, reference, arithmetics=("float32", "llama.cpp"))
    assert report.verdict in (Verdict.AGREE, Verdict.NEAR_TIE)
    gate = report.layers[1].stages[Stage.FFN_GATE]
    # 8-bit activations: 1e-3 to 3e-2 of the product (kernels.md section 2).
    assert 1e-3 < gate.local_rel_l2 < 3e-2
    assert gate.arithmetic_rel_l2 == gate.local_rel_l2
    norm = report.layers[1].stages[Stage.ATTN_NORM]
    assert norm.local_rel_l2 < 1e-6


def test_a_fault_far_below_the_arithmetics_difference_is_still_found(folder: Path, reference: Checkpoint) -> None:
    """The files are judged under one arithmetic, so that the drift between two does not hide them."""
    name = "model.layers.1.mlp.gate_proj.weight"
    model = changed(folder, reference, name, lambda v: v * np.float32(1.001))
    decoded = model.tensors[name].decode() - reference.tensors[name].decode()
    assert np.abs(decoded).max() > 0
    report = compare(model, reference, arithmetics=("float32", "llama.cpp"))
    assert place(report) == (1, Stage.FFN_GATE)


def test_equal_values_in_another_block_type(folder: Path, reference: Checkpoint) -> None:
    values = {name: tensor.decode() for name, tensor in reference.tensors.items()}
    wide = write_tiny(folder / "wide.apr", tiny_checkpoint(values=values))
    report = compare(wide, reference, arithmetics=("float32", "float32"))
    assert report.verdict is Verdict.AGREE
    assert "block-types-differ" in [f.id for f in report.findings]
    integer = compare(wide, reference)
    assert integer.verdict is not Verdict.UNMEASURED
    if integer.first_divergence is not None:
        assert "holds equal values as F32 and Q" in integer.first_divergence.cause


def test_disagreeing_tokenizers_are_the_first_cause(reference: Checkpoint) -> None:
    tokens = TokensReport("test", "x", "none", TOKENS, agree=False, reason="the tokenizers disagree from position 0")
    runner = Runner(reference, PRESETS["float32"])
    report = layers(runner, runner, tokens=tokens, positions=(0,))
    assert report.verdict is Verdict.DIVERGENCE
    assert place(report) == (OUTSIDE, Stage.EMBEDDING)
    assert report.layers


def test_reports_show_themselves(folder: Path, reference: Checkpoint) -> None:
    report = compare(changed(folder, reference, "model.layers.1.mlp.up_proj.weight", lambda v: v * 1.1), reference)
    assert report.top(1)[0]["stage"] == "ffn_up"
    frame = report.to_frame()
    assert len(frame) == 3 + 3 * len(LAYER_STAGES)
    assert "layer 1, ffn_up" in report._repr_html_()


def test_random_models_of_any_seed_agree_with_themselves(folder: Path) -> None:
    for seed in range(3):
        model = write_tiny(folder / "seed.apr", tiny_checkpoint(values=random_values(CONFIG, seed=seed)))
        assert compare(model, model, arithmetics=("float32", "float32")).verdict is Verdict.AGREE
