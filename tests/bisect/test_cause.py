"""A stage's difference is put down to what it reads, with the search's own next step and what proves it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_checkpoint, with_tensor

from aprjax.bisect.cause import accuse, of_tensor
from aprjax.bisect.choices import CHOICES, differing_choices, matrices_of
from aprjax.bisect.confidence import Confidence, Level, by_residual
from aprjax.bisect.files import TensorDifference, compare_files
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic, preset
from aprjax.qwen2.stages import Stage

FLOAT, LLAMA = preset("float32"), preset("llama.cpp")
UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return tiny_checkpoint(types={"up_proj": "Q4_K", "down_proj": "Q8_0"})


def accused(model: Checkpoint, ref: Checkpoint, stage: Stage) -> tuple[str, str, Confidence]:
    found = accuse(1, stage, compare_files(model, ref), (FLOAT, FLOAT))
    return found.cause, found.next_step, found.confidence


def test_a_tensor_is_accused_in_the_search_s_words(base: Checkpoint) -> None:
    model = with_tensor(base, GATE, np.roll(base.tensors[GATE].decode(), 1, axis=0))
    cause, step, confidence = accused(model, base, Stage.FFN_GATE)
    (difference,) = compare_files(model, base).differing
    assert cause == f"{GATE} differs: {difference.explanation}"
    assert (step, bool(step)) == (difference.next_step, True)
    assert confidence.level is Level.CERTAIN
    assert "bit for bit" in confidence.basis
    assert difference.basis in confidence.basis


def test_what_nothing_explains_is_certain_to_differ_and_says_what_was_nearest(base: Checkpoint) -> None:
    noise = np.random.default_rng(3).normal(0, 0.06, base.tensors[GATE].shape)
    _, _, confidence = accused(with_tensor(base, GATE, noise), base, Stage.FFN_GATE)
    assert confidence.level is Level.CERTAIN
    assert "what happened to it is not known (the nearest hypothesis, " in confidence.basis


def test_all_that_a_stage_reads_is_named(base: Checkpoint) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    model = with_tensor(base, name, base.tensors[name].decode() * 2)
    model = replace(model, config=replace(model.config, rms_norm_eps=1e-5))
    cause, step, _ = accused(model, base, Stage.FFN_NORM)
    assert cause.startswith("rms_norm_eps is 1e-05 in the model and 1e-06 in the reference; ")
    assert f"{name} differs" in cause
    assert step.startswith("correct rms_norm_eps")


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        ({"explanation_id": "missing"}, Level.CERTAIN, "seen in the file"),
        (
            {"explanation_id": "scaled", "residual": 0.0, "basis": "64 sampled rows, encoded"},
            Level.CERTAIN,
            "the predicted values, encoded, are the file's bit for bit (64 sampled rows)",
        ),
        ({"residual": 0.01, "tolerance": 0.02, "excluded": (("transposed", 1.4),)}, Level.STRONG, "transposed"),
        ({"residual": 0.01, "tolerance": 0.02, "excluded": (("scaled", 0.015),)}, Level.WEAK, "0.015"),
        ({"residual": 0.03, "tolerance": 0.02}, Level.WEAK, "residual 0.03"),
    ],
)
def test_a_confidence_says_what_it_rests_on(found: dict[str, object], level: Level, words: str) -> None:
    difference = TensorDifference(UP, ("Q4_K", "Q4_K"), 0.1, 0.99, 4, 0, "scaled by 2", explanation_id="scaled")
    confidence = of_tensor(replace(difference, **found)).confidence  # pyright: ignore[reportArgumentType]
    assert confidence.level is level
    assert words in confidence.basis


def test_a_residual_s_confidence() -> None:
    assert by_residual(0.0, 0.0).level is Level.CERTAIN
    found = by_residual(2e-6, 1e-5, measured_on="all values", next_best=("rms eps", 0.3))
    assert found.level is Level.STRONG
    assert found.sentence() == (
        "strong: residual 2e-06 (all values) against 1e-05 that rounding explains; the next best hypothesis, rms eps, "
        "leaves 0.3"
    )
    assert found.to_json() == {"level": "strong", "basis": found.basis}


@pytest.mark.parametrize("one", PRESETS.values(), ids=str)
def test_two_arithmetics_are_the_sum_of_their_choices(one: Arithmetic) -> None:
    for other in PRESETS.values():
        mixed = other
        for choice in differing_choices(one, other):
            assert choice.put_into(mixed, one) != mixed
            mixed = choice.put_into(mixed, one)
        assert replace(mixed, name=one.name) == one


def test_activations_are_named_by_the_blocks_that_the_weights_pair_them_with(base: Checkpoint) -> None:
    activations = CHOICES[0]
    up, out = (matrices_of(base, 1, stage) for stage in (Stage.FFN_UP, Stage.FFN_OUT))
    assert activations.words(LLAMA, up) == "activations quantized per 256 (Q8_K)"
    assert activations.words(LLAMA, out) == "activations quantized per 32 (Q8_0)"
    assert activations.words(LLAMA, (*up, *out)) == "activations quantized per 256 (Q8_K), per 32 (Q8_0)"
    assert activations.words(preset("q8_1"), up) == "activations quantized per 32 (Q8_1)"
    assert activations.words(FLOAT, up) == "activations not quantized"
    # Float weights have no integer dots in any engine.
    assert activations.words(LLAMA, matrices_of(base, 1, Stage.FFN_GATE)) == "activations not quantized"
