"""Gradients: equal to finite differences in double precision, and flowing through the integer path."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint

from aprjax.blocks.relay import relay
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage, kernels
from aprjax.qwen2.model import Qwen2, causal_context, logits, precision_scope

TOKENS = [5, 17, 300, 5, 256, 41]
SMALL = replace(CONFIG, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=96)
PLACES = [
    (OUTSIDE, Stage.EMBEDDING),
    *[(layer, s) for layer in (0, 1) for s in LAYER_STAGES],
    (OUTSIDE, Stage.FINAL_NORM),
]


def margin(output: jax.Array) -> jax.Array:
    """What the investigations differentiate: the difference of two logits of the last position."""
    return output[-1, 3] - output[-1, 41]


@pytest.fixture(scope="module")
def gradients() -> dict[tuple[int, Stage], tuple[np.ndarray, float, float]]:
    """At every place: a random direction, the gradient along it, and the central difference along it."""
    arithmetic = PRESETS["float64"]
    model = Qwen2(tiny_checkpoint(SMALL), arithmetic)
    _, trace = model.run_with_cache(TOKENS)
    generator = np.random.default_rng(1)
    with precision_scope(arithmetic):
        parameters = model.parameters(TOKENS)
        context = causal_context(model.config, arithmetic, length=len(TOKENS))

        def of(perturbations: dict) -> jax.Array:
            return margin(logits(parameters, context, perturbations, arithmetic=arithmetic))

        zeros = {place: jnp.zeros(trace[place].shape, jnp.float64) for place in PLACES}
        gradient = jax.grad(of)(zeros)
        run = jax.jit(of)
        found = {}
        for place in PLACES:
            direction = generator.normal(size=trace[place].shape)
            if place[1] is Stage.ATTN_SOFTMAX:
                # Hidden keys are reached by no query: a perturbation there would be no longer a softmax.
                heads = direction.reshape(len(TOKENS), -1, len(TOKENS))
                direction = (heads * np.tri(len(TOKENS))[:, None]).reshape(direction.shape)
            # A step of the cube root of 2^-53 balances truncation against rounding.
            step = 2.0**-18
            ends = [float(run({**zeros, place: jnp.asarray(sign * step * direction)})) for sign in (1, -1)]
            along = float(jnp.vdot(gradient[place], direction))
            found[place] = (direction, along, (ends[0] - ends[1]) / (2 * step))
    return found


@pytest.mark.parametrize("place", PLACES, ids=[f"{layer}-{stage}" for layer, stage in PLACES])
def test_float64_gradients_equal_finite_differences(gradients: dict, place: tuple[int, Stage]) -> None:
    _, along, difference = gradients[place]
    # The central difference's own error: step^2 = 1.5e-11 times a third derivative of order one to a hundred.
    assert along == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_no_gradient_is_zero_everywhere(gradients: dict) -> None:
    dead = [place for place, (_, along, _) in gradients.items() if along == 0.0]
    assert not dead


# Every emulated kernel and every way to quantize activations is in one of these.
@pytest.mark.parametrize(
    "name",
    [
        "llama.cpp",
        *(
            pytest.param(n, marks=pytest.mark.thorough)
            for n in ("llama.cpp-exact", "realizar", "realizar-integer", "realizar-f32", "q8_1")
        ),
    ],
)
def test_gradients_flow_straight_through_every_preset(float32_gradient: np.ndarray, name: str) -> None:
    found = embedding_gradient(name)
    assert np.isfinite(found).all()
    cosine = float32_gradient @ found / (np.linalg.norm(float32_gradient) * np.linalg.norm(found))
    # Straight through, an engine's gradient is the float one's, taken at values that the
    # activations' 8 bits move by about 1e-2, and float sums by 1e-6.
    assert cosine > (0.999999 if PRESETS[name].matmul == "dequantize" else 0.99)


@pytest.mark.parametrize(("name", "kind"), [("F32", "<f4"), ("F16", "<f2")])
def test_exact_products_of_plain_floats_have_the_gradient_of_the_float_product(name: str, kind: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 64)).astype(kind)
    weight, x = relay(name, matrix.view(np.uint8).reshape(40, 64, -1)), np.ones((3, 64), np.float32)
    # The weight is traced, as in `run_layer`.
    total = jax.jit(lambda weight, x: kernels.matmul(weight, x, PRESETS["llama.cpp-exact"]).sum())
    found = jax.grad(total, argnums=1)(jax.device_put(weight), x)
    np.testing.assert_allclose(found[0], matrix.astype(float).sum(axis=0), rtol=1e-5, atol=1e-5)


def embedding_gradient(name: str) -> np.ndarray:
    """The gradient of the margin with respect to the embedding rows, flat."""
    arithmetic = PRESETS[name]
    model = Qwen2(tiny_checkpoint(replace(CONFIG, num_layers=1), types={"": "Q4_K"}), arithmetic)
    parameters = model.parameters(TOKENS)
    context = causal_context(model.config, arithmetic, length=len(TOKENS))

    def of(embedding: jax.Array) -> jax.Array:
        return margin(logits(replace(parameters, embedding=embedding), context, arithmetic=arithmetic))

    return np.asarray(jax.grad(of)(parameters.embedding)).ravel()


@pytest.fixture(scope="module")
def float32_gradient() -> np.ndarray:
    """What the others are compared with."""
    return embedding_gradient("float32")
