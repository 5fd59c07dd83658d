"""What programs for a GPU multiply with, read in their StableHLO: lowering for one needs none.

What only a GPU can show is in the last test, which says why it is skipped where there is none.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks.support import QUANTIZED, SCALE_BYTES, random_blocks
from tiny import CONFIG, tiny_checkpoint

from aprjax.blocks import block_format
from aprjax.blocks import units as units_module
from aprjax.blocks.dot import integer_matmul, largest_product
from aprjax.blocks.halves import through_half
from aprjax.blocks.relay import relay
from aprjax.qwen2 import model
from aprjax.qwen2.arithmetic import PRESETS
from aprjax.qwen2.loading import load_layer
from aprjax.qwen2.stages import Stage

# All float: these presets stand for exact products of real numbers.
REFERENCES = ("float32", "float64", "realizar-f32", "q8_1", "realizar")
ONE_LAYER = replace(CONFIG, num_layers=1)
_DOT = re.compile(
    r"stablehlo\.dot_general (?P<options>.*?) : \(tensor<[^>]*?(?P<left>\w+)>, tensor<[^>]*?(?P<right>\w+)>\)"
    r" -> tensor<[^>]*?(?P<out>\w+)>"
)


def dots(text: str) -> list[tuple[str, str, str, bool]]:
    """(left, right and result type, whether at HIGHEST precision) of every matrix product of a program."""
    found = []
    for line in text.splitlines():
        if "dot_general" not in line and "convolution" not in line:
            continue
        match = _DOT.search(line)
        assert match is not None, line
        types = (part.split("x")[-1] for part in match.group("left", "right", "out"))
        found.append((*types, "precision = [HIGHEST, HIGHEST]" in match["options"]))
    return found


def for_gpu(function, *arguments) -> str:
    """The program that a GPU gets."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def accelerated(monkeypatch):
    """Programs are traced as they are where an accelerator is the default device."""
    monkeypatch.setattr(units_module, "accelerated", lambda: True)
    monkeypatch.setattr("aprjax.blocks.dot.accelerated", lambda: True)
    monkeypatch.setattr("aprjax.blocks.dot.pays_for_one_token", lambda: False)


def layer_program(name: str) -> str:
    """A layer of Q4_K and Q6_K and a plain matrix under a preset, with a head's product behind it."""
    arithmetic = PRESETS[name]
    checkpoint = tiny_checkpoint(ONE_LAYER, types={"": "Q4_K", "down": "Q6_K", "v_proj": "F16"})
    layer = load_layer(checkpoint, 0)
    with model.precision_scope(arithmetic):
        context = model.causal_context(ONE_LAYER, arithmetic, length=8)
        hidden = jnp.ones((8, ONE_LAYER.hidden_size), arithmetic.dtype)
        run = partial(model.run_layer.__wrapped__, arithmetic=arithmetic, capture=False)
        return for_gpu(lambda layer, hidden, context: run(layer, hidden, context, {}, {}), layer, hidden, context)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("name", ["float32", *(pytest.param(n, marks=pytest.mark.thorough) for n in REFERENCES[1:])])
def test_a_reference_multiplies_floats_at_the_highest_precision(name):
    wide = "f64" if PRESETS[name].dtype == "float64" else "f32"
    found = dots(layer_program(name))
    # Seven matrices, scores and weighted values.
    assert len(found) >= 9
    assert set(found) == {(wide, wide, wide, True)}


@pytest.mark.thorough
@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp-exact", "llama.cpp-flash"])
def test_an_engines_layer_has_no_other_products_than_exact_and_highest(name):
    found = set(dots(layer_program(name)))
    assert found <= {("f32", "f32", "f32", True), ("bf16", "bf16", "f32", True), ("f16", "f16", "f32", True)}
    assert ("f16" in {left for left, *_ in found}) == (name != "llama.cpp-exact")


def extreme_product(name: str) -> tuple:
    """Weights with the largest codes and group scales a format has among random ones, and extreme activations."""
    generator = np.random.default_rng(5)
    packed = random_blocks(name, (16, 512 // block_format(name).block_size), generator)
    first, end = SCALE_BYTES.get(name, (0, 2))
    scales = packed[..., first:end].copy()
    packed[0], packed[1] = 0xFF, 0x80
    packed[..., first:end] = scales
    x = generator.integers(-127, 128, (5, 512)).astype(np.float32)
    x[0], x[1], x[:, ::32] = 127.0, -127.0, 127.0
    return relay(name, packed), jnp.asarray(x)


@pytest.mark.parametrize(
    "name", ["Q4_K", *(pytest.param(n, marks=pytest.mark.thorough) for n in QUANTIZED if n != "Q4_K")]
)
def test_integers_go_to_matrix_units_in_a_type_that_holds_them(name, request):
    weights, x = extreme_product(name)
    expected = np.asarray(jax.jit(lambda w, x: integer_matmul(name, w, x))(weights, x))
    request.getfixturevalue("accelerated")
    product = jax.jit(lambda w, x: integer_matmul(name, w, x))
    text = product.trace(weights, x).lower(lowering_platforms=("cuda",)).as_text()
    small = {left for left, right, out, _ in dots(text) if left == right and out == "f32" and left != "f32"}
    whole = "bf16" if largest_product(name) <= 256 or name in ("Q5_K", "Q6_K") else "f16"
    assert small == {whole}
    # Minimums' dots alone stay float32, at HIGHEST precision.
    assert {dot for dot in dots(text) if dot[0] == "f32"} <= {("f32", "f32", "f32", True)}
    np.testing.assert_array_equal(np.asarray(product(weights, x)), expected)


def test_rounding_to_float16_is_numpys_and_no_conversion():
    """Every float16 number, every number half-way between two, and both neighbours of these."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    between = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(between, np.float32(sign * np.inf)) for sign in (1, -1)]
    beyond = np.array([65519.99, 65520, -65520, 1e9, np.inf, -np.inf, np.nan, 1e-30, 2.0**-25], np.float32)
    values = np.concatenate([halves, between, *beside, beyond])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(through_half)(values)), expected)
    # XLA's GPU backend drops conversions there and back.
    assert "f16" not in for_gpu(through_half, jnp.ones(4))
    assert jax.grad(lambda x: through_half(2 * x))(3.0) == 2.0


@pytest.mark.thorough
@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("name", ["llama.cpp-f16", "llama.cpp-flash"])
def test_no_rounding_of_an_engine_is_a_conversion_that_a_gpu_drops(name):
    floats = r"tensor<[^>]*xf(?:32|64)>"
    # Names of values are a function's own.
    for function in layer_program(name).split("func.func"):
        for narrow in re.findall(rf"(%\w+) = stablehlo\.convert %\w+ : \({floats}\) -> tensor<[^>]*xf16>", function):
            assert not re.search(rf"stablehlo\.convert {narrow} : \(tensor<[^>]*xf16>\) -> {floats}", function)


@pytest.mark.gpu
def test_a_gpu_has_the_processors_bits(gpu):
    """Of whole products, since everything in them is integers or rounded where the code says."""
    for name in QUANTIZED:
        weights, x = extreme_product(name)
        found = []
        for device in (jax.devices("cpu")[0], gpu):
            product = jax.jit(lambda w, x, name=name: integer_matmul(name, w, x))
            found.append(np.asarray(product(*jax.device_put((weights, x), device))))
        np.testing.assert_array_equal(*found, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float32", "llama.cpp"])
def test_a_gpu_has_the_processors_stages(name, gpu):
    """Each stage of a layer within what two float32 summations differ by, far below what TF32 leaves (2^-11)."""
    checkpoint = tiny_checkpoint(ONE_LAYER, types={"": "Q4_K", "down": "Q6_K"})
    tokens = list(range(1, 12))
    with jax.default_device(jax.devices("cpu")[0]):
        _, expected = model.Qwen2(checkpoint, PRESETS[name]).run_with_cache(tokens)
    with jax.default_device(gpu):
        _, found = model.Qwen2(checkpoint, PRESETS[name]).run_with_cache(tokens)
    for stage in (Stage.QKV_MATMUL, Stage.ATTN_SCORES, Stage.ATTENTION):
        a, b = (np.asarray(values[0, stage], np.float64) for values in (found, expected))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b), stage
