"""The kernels between the matrix products: JAX against the NumPy twins, and these against ggml, all to the bit."""

from __future__ import annotations

import ctypes
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aprjax.blocks import block_format, dequantize
from aprjax.blocks.exact_pieces import add_eight
from aprjax.blocks.relay import relay
from aprjax.blocks.twins import vec_dot
from aprjax.qwen2 import engine, realizar, twins
from aprjax.qwen2.rope import rope_tables
from aprjax.qwen2.rounding import wide

RNG = np.random.default_rng
EPS = 1e-6


def same(ours: jax.Array | np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bits, the sign of zero and subnormal numbers included."""
    ours = np.asarray(ours)
    assert ours.dtype == theirs.dtype == np.float32
    return ours.shape == theirs.shape and ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


def rows(*, seed: int = 0, width: int = 896) -> np.ndarray:
    """Rows of several sizes, one with a massive activation, one of zeros."""
    values = RNG(seed).normal(size=(40, width)) * 2.0 ** RNG(seed + 1).integers(-20, 12, (40, 1))
    values[3, width // 2] = 790.0
    values[4] = 0.0
    return values.astype(np.float32)


def arguments() -> np.ndarray:
    """For exponentials: dense near zero, and where results become subnormal, zero and infinite."""
    edges = np.array([0.0, -0.0, 88.72, 88.73, -87.33, -87.34, -103.9, -104.1, 126.5, 200.0, 1e30, -1e30], np.float32)
    spread = [RNG(0).normal(size=20_000) * scale for scale in (1e-3, 1, 10, 60)]
    return np.concatenate([edges, np.linspace(-110, -80, 30_000), *spread]).astype(np.float32)


def scores(*, scale: float, heads: int = 3, keys: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores of several heads over some rows, and a causal mask that starts at key 5."""
    visible = np.arange(keys)[None] <= np.arange(5, 21)[:, None]
    return (RNG(7).normal(size=(heads, 16, keys)) * scale).astype(np.float32), visible


@pytest.mark.parametrize("width", [896, 1536, 100])
def test_rms_norm(width: int) -> None:
    x, weight = rows(width=width), RNG(9).normal(1, 0.3, width).astype(np.float32)
    kernel = jax.jit(engine.rms_norm, static_argnames="exact")
    assert same(kernel(x, weight, EPS, exact=True), twins.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("rotation", ["fused", "separate"])
@pytest.mark.parametrize("pairing", ["neox", "norm"])
def test_rotation(rotation: Literal["fused", "separate"], pairing: Literal["neox", "norm"]) -> None:
    x = RNG(0).normal(size=(64, 4, 64)).astype(np.float32)
    cos, sin = rope_tables(np.arange(64), theta=1e6, head_dim=64, kind="iterated")
    ours = np.asarray(jax.jit(engine.rotate, static_argnums=(3, 4))(x, cos, sin, pairing, rotation))

    def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if pairing == "neox":
            return values[..., :32], values[..., 32:]
        return values[..., 0::2], values[..., 1::2]

    expected = twins.rotate(*split(x), cos[:, None], sin[:, None], rotation)
    for mine, theirs in zip(split(ours), expected, strict=True):
        assert same(np.ascontiguousarray(mine), theirs)


def test_the_two_rotations_differ() -> None:
    x = RNG(0).normal(size=(2, 4000)).astype(np.float32)
    angle = RNG(1).normal(size=4000)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    fused, separate = (twins.rotate(x[0], x[1], cos, sin, kind)[0] for kind in ("fused", "separate"))
    assert 0.05 < np.mean(fused != separate) < 0.5


def test_exponential_and_silu() -> None:
    from aprjax.qwen2.rounding import narrow

    x = arguments()
    assert same(jax.jit(lambda x: narrow(engine.exponential_wide(wide(x))))(x), twins.exponential(x))
    assert same(jax.jit(engine.silu)(x[None])[0], twins.silu(x))


@pytest.mark.parametrize("scale", [0.1, 3, 40])
def test_softmax(scale: float) -> None:
    values, visible = scores(scale=scale)
    ours = jax.jit(lambda x, seen: engine.softmax(x, seen, engine.exponential_wide))(values, visible)
    assert same(ours, twins.softmax(values, visible[None]))


def test_the_compiled_exponential_stays_by_the_engines() -> None:
    """Sums and products may be fused or not: three roundings of a result near 1, and nothing lost at the ends."""
    x = arguments()
    ours, expected = np.asarray(jax.jit(engine.exponential)(x)), twins.exponential(x)
    normal = (expected >= np.finfo(np.float32).tiny) & np.isfinite(expected)
    np.testing.assert_allclose(ours[normal], expected[normal], rtol=3e-7, atol=0)
    assert (ours[~normal & (expected < 1)] < np.finfo(np.float32).tiny).all()
    assert np.array_equal(np.isposinf(ours), np.isposinf(expected))
    assert np.isnan(jax.jit(engine.exponential)(np.float32(np.nan)))
    silu = np.asarray(jax.jit(engine.silu_compiled)(x[None])[0])
    np.testing.assert_allclose(silu[normal], twins.silu(x)[normal], rtol=4e-7, atol=1e-37)
    values, visible = scores(scale=3)
    softmax = jax.jit(lambda x, seen: engine.softmax_compiled(x, seen, engine.exponential))(values, visible)
    reference = twins.softmax(values, visible[None])
    np.testing.assert_allclose(softmax, reference, rtol=6e-7, atol=1e-37)
    assert np.array_equal(np.asarray(softmax) == 0, reference == 0)


def test_softmax_does_not_see_padding() -> None:
    values, visible = scores(scale=3)
    padded = np.pad(values, ((0, 0), (0, 0), (0, 216))), np.pad(visible, ((0, 0), (0, 216)))
    run = jax.jit(lambda x, seen: engine.softmax(x, seen, engine.exponential_wide))
    assert same(np.ascontiguousarray(np.asarray(run(*padded))[..., :40]), np.asarray(run(values, visible)))


@pytest.mark.parametrize("channels", [64, 128])
def test_attention_products(channels: int) -> None:
    """Grouped heads, keys that are no multiple of ggml's step."""
    q = RNG(0).normal(size=(9, 4, channels)).astype(np.float32)
    k, v = RNG(1).normal(size=(2, 40, 2, channels)).astype(np.float32)
    ours = np.asarray(jax.jit(engine.attention_scores)(q, k))
    probabilities = RNG(2).random((4, 9, 40)).astype(np.float32)
    merged = np.asarray(jax.jit(engine.weighted_values)(probabilities, v)).reshape(9, 4, channels)
    for head in range(4):
        assert same(ours[head], twins.attention_scores(q[:, head], k[:, head // 2]))
        padded = np.pad(probabilities[head], ((0, 0), (0, 24))), np.pad(v[:, head // 2], ((0, 24), (0, 0)))
        assert same(np.ascontiguousarray(merged[:, head]), twins.weighted_values(*padded))


@pytest.mark.parametrize("size", [32, 256])
def test_realizars_activation_blocks(size: int) -> None:
    x = rows(width=512)
    x[5, :size] = np.arange(size) % 32 - 16 + 0.5
    x[5, 0] = 127.0  # a scale of one: every other value lies between two codes
    codes, scale = jax.jit(realizar.quantize, static_argnums=1)(x, size)
    expected = twins.realizar_blocks(x, size)
    assert np.array_equal(codes, expected[0])
    assert same(scale, expected[1])
    assert expected[0][5, 0, 16] == 1  # 0.5 goes away from zero; half to even would give 0


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "Q8_0"])
def test_realizars_integer_dots(name: str) -> None:
    x, blocks = rows(width=512)[:5], block_format(name)
    packed = RNG(10).integers(0, 256, (40, 512 // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
    # The scales, of which Q4_K has two, come first.
    for start in (0, 2) if name == "Q4_K" else (0,):
        scales = RNG(start).normal(0, 0.01, packed.shape[:2]).astype("<f2")
        packed[..., start : start + 2] = scales[..., None].view(np.uint8)
    relaid = relay(name, packed)
    ours = np.asarray(jax.jit(lambda x: realizar.integer_matmul(relaid, x))(x))
    assert same(ours, twins.realizar_dot(name, packed[None], x[:, None]))
    # What realizar quantizes, multiplied and added in float64: all but the rounding of the sums.
    codes, scale = twins.realizar_blocks(x, realizar.ACTIVATION_BLOCKS[name])
    values = (codes * scale.astype(float)[..., None]).reshape(x.shape)
    exact = values @ dequantize(name, packed.reshape(-1), (40, 512)).astype(float).T
    assert (np.abs(ours - exact) <= 1e-6 * np.abs(exact).max(axis=1, keepdims=True)).all()
    # ggml's scales of Q8_0 are float16: the two are told apart.
    ggml = vec_dot(name, packed[None], x[:, None])
    far = np.abs(ours - ggml).max() / np.abs(exact).max()
    assert far < 1e-6 if name == "Q4_K" else 1e-6 < far < 1e-2


def test_realizars_lanes_are_added_by_halves_and_then_neighbours() -> None:
    lanes = np.float32([2**24, 1, -(2**24), 1, 0, 0, 0, 0])
    assert float(realizar._add_by_hadd(jax.numpy.asarray(lanes))) == 1.0
    assert float(add_eight(lanes)) == 2.0


def test_realizars_norms() -> None:
    x, weight = rows(), RNG(9).normal(1, 0.3, 896).astype(np.float32)
    found = {}
    for name, kernel, twin in (
        ("lanes", realizar.rms_norm_lanes, twins.realizar_norm_lanes),
        ("sequential", realizar.rms_norm_sequential, twins.realizar_norm_sequential),
    ):
        found[name] = np.asarray(jax.jit(kernel)(x, weight, EPS))
        assert same(found[name], twin(x, weight, EPS)), name
    ggml = twins.rms_norm(x, weight, EPS)
    # Three orders of summing: they agree to a few units in the last place, and are not the same.
    for value in found.values():
        assert not np.array_equal(value, ggml)
        np.testing.assert_allclose(value, ggml, rtol=1e-5, atol=0)


def test_realizars_softmax() -> None:
    values, visible = scores(scale=3)
    # The exponentials are taken as they are: the platform's library has its own last bits.
    largest = np.where(visible, values, -np.inf).max(axis=-1, keepdims=True)
    exponentials = np.where(visible, np.asarray(jax.jit(jnp.exp)(values - largest)), np.float32(0))

    def library(x: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            return wide(jnp.exp(x.astype(jnp.float32)))

    ours = jax.jit(lambda x, seen: realizar.softmax_sequential(x, seen, library))(values, visible)
    np.testing.assert_array_max_ulp(np.asarray(ours), twins.realizar_softmax(exponentials), maxulp=1)
    lanes = jax.jit(lambda x, seen: realizar.softmax_sequential(x, seen, engine.exponential_wide))(values, visible)
    polynomial = np.where(visible, twins.exponential(np.where(visible, values, largest) - largest), np.float32(0))
    assert same(lanes, twins.realizar_softmax(polynomial))


def test_realizars_rope_takes_a_power_for_every_pair() -> None:
    cos, sin = rope_tables(np.arange(300), theta=1e6, head_dim=64, kind="powf")
    powers = np.power(1e6, np.arange(0, 64, 2) / 64).astype(np.float32)
    angles = np.arange(300, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    # powf is within one unit in the last place of the correctly rounded power, the inverse adds half of one.
    slack = 4 * 2.0**-24 * (1 + np.abs(angles))
    assert (np.abs(cos - np.cos(angles.astype(np.float64))) <= slack).all()
    assert (np.abs(sin - np.sin(angles.astype(np.float64))) <= slack).all()
    iterated = rope_tables(np.arange(300), theta=1e6, head_dim=64, kind="iterated")
    assert np.mean(sin != iterated[1]) > 0.5


@pytest.mark.llama_cpp
def test_the_twins_of_exponential_silu_and_swiglu_are_ggmls(llama_library) -> None:
    x = arguments()[: len(arguments()) // 8 * 8]
    up = RNG(5).normal(size=x.size).astype(np.float32)
    silu, swiglu = np.empty_like(x), np.empty_like(x)

    def address(array: np.ndarray) -> ctypes.c_void_p:
        return array.ctypes.data_as(ctypes.c_void_p)

    llama_library.cpu.ggml_vec_silu_f32(x.size, address(silu), address(x))
    assert same(twins.silu(x), silu)
    llama_library.cpu.ggml_vec_swiglu_f32(x.size, address(swiglu), address(x), address(up))
    assert same(twins.silu(x) * up, swiglu)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("scale", [0.1, 3, 40])
def test_the_twin_of_softmax_is_ggmls(llama_library, scale: float) -> None:
    function = llama_library.cpu.ggml_vec_soft_max_f32
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
    for seed in range(20):
        x = (RNG(seed).normal(size=256) * scale).astype(np.float32)
        exponentials = np.empty_like(x)
        total = function(x.size, exponentials.ctypes.data, x.ctypes.data, x.max())
        assert same(twins.softmax(x, np.ones(256, bool)), exponentials * np.float32(1 / total))
