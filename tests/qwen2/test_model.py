"""The model against a plain NumPy Qwen2 in double precision: every stage, every arithmetic, cache and padding."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from qwen2.reference import forward, relative_l2
from tiny import CONFIG, tiny_checkpoint

from aprjax.checkpoint.types import CheckpointError, ModelConfig
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage
from aprjax.qwen2.generate import Cache, extend, generate_greedy
from aprjax.qwen2.model import Qwen2, bucket, precision_scope

TOKENS = [5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7]

# float32 sums of up to 512 products: relative error of the order of 2^-24 times the square root of the
# length, carried through three layers. The largest seen over the shapes below is 1.2e-6 (ffn_out of the last layer).
FLOAT32 = 2e-6
# The same in double precision (2^-53): the largest seen is 2.4e-15.
FLOAT64 = 1e-13

SHAPES = {
    "grouped": CONFIG,
    "one kv head": replace(CONFIG, num_kv_heads=1),
    "every head its own": replace(CONFIG, num_kv_heads=4),
    "adjacent pairs": replace(CONFIG, rope_pairing="norm"),
    "theta and eps": replace(CONFIG, rope_theta=10_000.0, rms_norm_eps=1e-5),
    "head_dim apart from hidden/heads": replace(CONFIG, num_heads=2, num_kv_heads=1, head_dim=32),
    "odd sizes": replace(CONFIG, hidden_size=96, num_heads=3, num_kv_heads=3, head_dim=32, intermediate_size=160),
}


@pytest.mark.parametrize(
    ("config", "tied"),
    [*((config, False) for config in SHAPES.values()), (SHAPES["grouped"], True), (SHAPES["odd sizes"], True)],
    ids=[*SHAPES, "grouped, tied head", "odd sizes, tied head"],
)
def test_every_stage_equals_the_reference_in_float32_and_float64(config: ModelConfig, tied: bool) -> None:
    checkpoint = tiny_checkpoint(config, tied=tied)
    expected = forward(checkpoint, TOKENS)
    for name, limit in (("float32", FLOAT32), ("float64", FLOAT64)):
        logits, trace = Qwen2(checkpoint, PRESETS[name]).run_with_cache(TOKENS)
        assert logits.shape == (len(TOKENS), config.vocab_size)
        assert list(trace) == list(expected)
        assert str(logits.dtype) == name
        for (layer, stage), value in expected.items():
            ours = np.asarray(trace[layer, stage])
            assert ours.shape == value.shape, (layer, stage)
            assert relative_l2(ours, value) < limit, (name, layer, stage)


@pytest.mark.parametrize(
    "block_type", ["Q4_K", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("Q6_K", "Q8_0"))]
)
def test_dequantized_arithmetic_is_that_of_the_decoded_weights(block_type: str) -> None:
    checkpoint = tiny_checkpoint(types={"": block_type})
    expected = forward(checkpoint, TOKENS)[OUTSIDE, Stage.LM_HEAD]
    assert relative_l2(np.asarray(Qwen2(checkpoint, PRESETS["float64"])(TOKENS)), expected) < FLOAT64
    assert relative_l2(np.asarray(Qwen2(checkpoint)(TOKENS)), expected) < FLOAT32


@pytest.mark.parametrize("block_type", ["Q4_K", "Q6_K", "Q8_0"])
def test_integer_arithmetic_multiplies_the_quantized_activations(block_type: str) -> None:
    """Given the same inputs, each node differs from the float64 product of the same real numbers by rounding only."""
    checkpoint = tiny_checkpoint(types={"": block_type})
    integer = PRESETS["llama.cpp"]
    _, trace = Qwen2(checkpoint, integer).run_with_cache(TOKENS)
    activation = {"Q4_K": "Q8_K", "Q6_K": "Q8_K", "Q8_0": "Q8_0"}[block_type]
    from aprjax.blocks.activations import QUANTIZERS

    for stage, source, name in (
        (Stage.ATTN_OUT, Stage.ATTENTION, "self_attn.o_proj"),
        (Stage.FFN_GATE, Stage.FFN_NORM, "mlp.gate_proj"),
        (Stage.FFN_OUT, Stage.FFN_SWIGL, "mlp.down_proj"),
    ):
        blocks = QUANTIZERS[activation](np.asarray(trace[1, source]))
        x = (blocks.codes.astype(np.float64) * blocks.scale[..., None]).reshape(len(TOKENS), -1)
        weight = checkpoint.tensors[f"model.layers.1.{name}.weight"].decode().astype(np.float64)
        # 3e-7: re-associated float32 sums against exact ones (kernels.md section 5, (c)).
        assert relative_l2(np.asarray(trace[1, stage]), x @ weight.T) < 3e-7, stage
        # Not the unquantized product: that differs by the activations' rounding, some 1e-3 to 1e-2.
        plain = np.asarray(trace[1, source], np.float64) @ weight.T
        assert relative_l2(np.asarray(trace[1, stage]), plain) > 1e-4


def test_layers_of_one_block_mix_share_one_program() -> None:
    from aprjax.qwen2.model import run_layer

    checkpoint = tiny_checkpoint(replace(CONFIG, num_layers=4), types={"": "Q4_K", "layers.3.mlp.down": "Q6_K"})
    run_layer.clear_cache()
    Qwen2(checkpoint)(TOKENS)
    assert run_layer._cache_size() == 2


def test_padding_to_a_bucket_changes_nothing_that_is_seen() -> None:
    model = Qwen2(tiny_checkpoint())
    assert bucket(9) == 16
    long, _ = model.run_with_cache(TOKENS)
    short, _ = model.run_with_cache(TOKENS[:5])
    # Other shapes may sum in another order; see FLOAT32.
    assert relative_l2(np.asarray(short), np.asarray(long)[:5]) < FLOAT32


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 127, 500, 2048])
def test_buckets_hold_their_prompts_and_waste_little(length: int) -> None:
    assert length <= bucket(length) <= max(8, 2 * length, length + 63)


@pytest.mark.parametrize("name", ["float32", "float64", "llama.cpp", "llama.cpp-exact"])
def test_decoding_with_a_cache_equals_the_whole_prompt_at_once(name: str) -> None:
    model = Qwen2(tiny_checkpoint(types={"": "Q8_0"}), PRESETS[name])
    whole = np.asarray(model(TOKENS))
    cache = Cache.empty(model.config, 32, model.arithmetic.dtype) if name != "float64" else None
    if cache is None:
        with precision_scope(model.arithmetic):
            cache = Cache.empty(model.config, 32, "float64")
    rows = []
    for part in (TOKENS[:4], TOKENS[4:5], TOKENS[5:6], TOKENS[6:11]):
        logits, cache = extend(model, part, cache)
        rows.append((cache.length - 1, np.asarray(logits)))
    # Integer arithmetic: a rounding of a sum may flip one rounding of an activation, which is 1/127 of it.
    limit = {"float32": FLOAT32, "float64": FLOAT64, "llama.cpp": 1e-2, "llama.cpp-exact": 0.0}[name]
    for position, logits in rows:
        if model.arithmetic.exact:
            # The engine's order of operations knows neither batches nor padding.
            assert np.array_equal(logits, whole[position]), position
        else:
            assert relative_l2(logits, whole[position]) < limit, position


def test_greedy_generation_is_the_argmax_of_every_step() -> None:
    model = Qwen2(tiny_checkpoint())
    continuation = generate_greedy(model, TOKENS, max_new_tokens=6)
    for step, token in enumerate(continuation):
        logits = np.asarray(model(TOKENS + continuation[:step]))
        assert token == int(logits[-1].argmax())
    stopped = generate_greedy(model, TOKENS, max_new_tokens=6, stop_ids=frozenset({continuation[2]}))
    assert stopped == continuation[: continuation.index(continuation[2]) + 1]


def test_a_full_cache_is_refused_in_words() -> None:
    model = Qwen2(tiny_checkpoint())
    with pytest.raises(ValueError, match="exceed the cache's capacity of 8"):
        extend(model, TOKENS, Cache.empty(model.config, 8))


def test_float16_cache_rounds_keys_and_values() -> None:
    checkpoint = tiny_checkpoint()
    half = replace(PRESETS["float32"], name="half", kv_cache="float16")
    _, plain = Qwen2(checkpoint).run_with_cache(TOKENS)
    _, rounded = Qwen2(checkpoint, half).run_with_cache(TOKENS)
    q, k = (np.asarray(plain[0, s]).astype(np.float16) for s in (Stage.Q_POST_ROPE, Stage.K_POST_ROPE))
    q, k = (x.astype(np.float64).reshape(len(TOKENS), -1, 64) for x in (q, k))
    expected = np.stack([q[:, head] @ k[:, head // 2].T / 8 for head in range(4)], axis=1).reshape(len(TOKENS), -1)
    assert relative_l2(np.asarray(rounded[0, Stage.ATTN_SCORES]), expected) < FLOAT32
    assert relative_l2(np.asarray(plain[0, Stage.ATTN_SCORES]), expected) > 1e-5


def test_missing_weights_and_wrong_shapes_are_refused_by_name() -> None:
    checkpoint = tiny_checkpoint()
    without = {n: t for n, t in checkpoint.tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        Qwen2(replace(checkpoint, tensors=without))
    other = replace(checkpoint, config=replace(CONFIG, intermediate_size=768))
    with pytest.raises(CheckpointError, match=r"expected shape \[768, 256\].*found \[512, 256\]"):
        Qwen2(other)
    with pytest.raises(CheckpointError, match="expected the architecture qwen2, found 'llama'"):
        Qwen2(replace(checkpoint, config=replace(CONFIG, architecture="llama")))
    with pytest.raises(CheckpointError, match=r"token id 100000 lies outside the embedding's \d+ rows"):
        Qwen2(checkpoint)([1, 100_000])


def test_missing_biases_count_as_zero() -> None:
    checkpoint = tiny_checkpoint()
    zeroed = dict(checkpoint.tensors)
    without = {n: t for n, t in checkpoint.tensors.items() if not n.endswith("k_proj.bias")}
    for name in set(zeroed) - set(without):
        zeroed[name] = replace(zeroed[name], data=np.zeros_like(zeroed[name].data))
    ours = Qwen2(replace(checkpoint, tensors=without))(TOKENS)
    theirs = Qwen2(replace(checkpoint, tensors=zeroed))(TOKENS)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_stage_names_are_named_scopes_of_the_program() -> None:
    from aprjax.qwen2.model import causal_context, run_layer

    model = Qwen2(tiny_checkpoint())
    context = causal_context(model.config, model.arithmetic, length=8)
    hidden = jax.numpy.zeros((8, CONFIG.hidden_size))
    lowered = run_layer.lower(
        model.layers[0], hidden, context, {}, {}, arithmetic=model.arithmetic, capture=False
    ).as_text(debug_info=True)
    for stage in LAYER_STAGES:
        assert str(stage) in lowered, stage
