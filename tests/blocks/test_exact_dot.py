"""Exact products in JAX: equal to the twins and to ggml to the bit, with little memory, differentiable."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aprjax.blocks import FORMATS, encode, exact_pieces
from aprjax.blocks import exact_floats as floats_module
from aprjax.blocks import float_twins as floats
from aprjax.blocks import relay as relay_module
from aprjax.blocks.dot import float_matmul, integer_matmul
from aprjax.blocks.exact import exact_dot, exact_dot_f32, exact_matmul
from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.relay import chunk_layout, relay
from aprjax.blocks.twins import vec_dot

from .support import QUANTIZED, adversarial_weights, bits, ggml_matmul, random_blocks, relative_rms, value_cases
from .test_twins import FLOAT_TWINS, multiply_add_cases

RNG = np.random.default_rng
exact = jax.jit(exact_matmul, static_argnums=0)
dots = jax.jit(exact_dot, static_argnums=0)

# XLA's CPU threads flush subnormal float32 numbers: activations are kept above what makes them (fused.py).
LEAST_ACTIVATION = 1e-28


def activations(rng: np.random.Generator) -> np.ndarray:
    """float32 `[tokens, 1024]`: the first two rows of each kind that quantizers treat differently."""
    rows = []
    for values in value_cases(rng).values():
        largest = np.abs(values).reshape(len(values), -1, 32).max(axis=-1)
        rows.append(values[((largest > LEAST_ACTIVATION) | (largest == 0)).all(axis=1)][:2])
    return np.concatenate(rows)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", QUANTIZED)
def test_products_equal_the_twins_and_ggml(name, llama_library):
    """Random, adversarial and non-finite weights by activations of every kind."""
    blocks = FORMATS[name]
    shape = (40, 1024 // blocks.block_size)
    parts = [adversarial_weights(name, 1024, RNG(1)), random_blocks(name, shape, RNG(2))]
    packed = np.concatenate([*parts, random_blocks(name, shape, RNG(3), finite=False)])
    x = activations(RNG(4))
    assert len(x) >= 28
    expected = vec_dot(name, packed, x[:, None])
    found = np.asarray(exact(name, relay(name, packed), x))
    np.testing.assert_array_equal(bits(found), bits(expected))
    np.testing.assert_array_equal(bits(ggml_matmul(llama_library.cpu, name, packed, x)), bits(expected))


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_pieces_and_chunks_change_nothing(name, monkeypatch):
    """Rows cut into chunks when re-laid and into pieces when multiplied, neither a divisor of the number of rows."""
    monkeypatch.setattr(relay_module, "CHUNK_ELEMENTS", 150 * 256)
    monkeypatch.setattr(exact_pieces, "_SUMS_TOGETHER", 0)
    monkeypatch.setattr(floats_module, "_SUMS_TOGETHER", 2 * 32 * 64)
    blocks = FORMATS[name]
    if blocks.quantized:
        packed = random_blocks(name, (401, 256 // blocks.block_size), RNG(5))
    else:
        packed = encode(name, RNG(5).normal(size=(401, 256)).astype(np.float32)).reshape(401, 256, -1)
    x = RNG(6).normal(size=(5, 256)).astype(np.float32)
    relaid = relay(name, packed)
    assert relaid.chunks == 3
    assert exact_pieces._piece_rows(5, 256) < relaid.chunk_rows
    if blocks.quantized:
        expected = vec_dot(name, packed, x[:, None])
    else:
        expected = FLOAT_TWINS[name](blocks.decode(packed)[..., 0], x[:, None])
    np.testing.assert_array_equal(bits(jax.jit(exact_matmul, static_argnums=0)(name, relaid, x)), bits(expected))


@pytest.mark.parametrize("name", sorted(FLOAT_TWINS))
def test_float_dots_equal_the_twins(name):
    """As in attention: leading axes that broadcast, and rows of very different size; and a remainder."""
    rng, width = RNG(7), 96 + 15
    left = (rng.normal(size=(2, 1, 5, width)) * 10.0 ** rng.uniform(-3, 3, (2, 1, 5, 1))).astype(np.float32)
    right = rng.normal(size=(3, 60, width)).astype(np.float32)
    expected = FLOAT_TWINS[name](left[..., :, None, :], right[..., None, :, :])
    np.testing.assert_array_equal(bits(dots(name, left, right)), bits(expected))


def test_the_callers_x64_mode_changes_nothing():
    """Neither a bit of the result nor its type."""
    packed = random_blocks("Q6_K", (20, 3), RNG(18), finite=False)
    x = RNG(19).normal(size=(2, 768)).astype(np.float32)
    relaid = relay("Q6_K", packed)
    with jax.enable_x64(True):
        found = jax.jit(exact_matmul, static_argnums=0)("Q6_K", relaid, x.astype(np.float64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(vec_dot("Q6_K", packed, x[:, None])))


def test_zeros_behind_the_cache_change_nothing():
    rng = RNG(8)
    left, right = (np.zeros((2, rows, 256), np.float32) for rows in (3, 9))
    left[..., :64], right[..., :64] = rng.normal(size=(2, 3, 64)), rng.normal(size=(2, 9, 64))
    expected = floats.vec_dot_f32(left[..., :64][..., :, None, :], right[..., :64][..., None, :, :])
    np.testing.assert_array_equal(bits(dots("F32", left, right)), bits(expected))


def test_fused_multiply_add_rounds_once():
    a, b, c = multiply_add_cases(RNG(9), 20_000)
    expected = floats.fused_multiply_add(a, b, c)
    np.testing.assert_array_equal(bits(jax.jit(fused_multiply_add)(a, b, c)), bits(expected))
    infinite = np.array([np.inf, 1, np.nan, 1e30, 3e38, 0], np.float32), np.float32([2, 1, 1, 1e30, 1, np.inf])
    added = np.array([1, -np.inf, 1, -1, 3e38, 1], np.float32)
    expected = floats.fused_multiply_add(*infinite, added)
    np.testing.assert_array_equal(bits(jax.jit(fused_multiply_add)(*infinite, added)), bits(expected))


def test_fused_multiply_adds_in_one_expression_keep_every_rounding():
    """XLA may drop a conversion to float32 between two float64 operations; the rounding must not go with it."""
    a, b, c = multiply_add_cases(RNG(10), 5000)
    d = RNG(11).normal(size=a.shape).astype(np.float32)

    def chain(a, b, c, d):
        return fused_multiply_add(d, a, fused_multiply_add(a, b, c) * d)

    inner = floats.fused_multiply_add(a, b, c)
    with np.errstate(over="ignore"):
        expected = floats.fused_multiply_add(d, a, inner * d)
    np.testing.assert_array_equal(bits(jax.jit(chain)(a, b, c, d)), bits(expected))


_WITHOUT_FMA = """
import sys
import jax
import numpy as np
from aprjax.blocks.exact import exact_matmul
from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.relay import relay

data = np.load(sys.argv[1])
a, b, c = data["a"], data["b"], data["c"]
np.savez(
    sys.argv[2],
    naive=np.asarray(jax.jit(lambda a, b, c: a * b + c)(a, b, c)),
    fused=np.asarray(jax.jit(fused_multiply_add)(a, b, c)),
    product=np.asarray(jax.jit(exact_matmul, static_argnums=0)("Q2_K", relay("Q2_K", data["packed"]), data["x"])),
)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag chooses among x86 processors")
def test_no_fma_instruction_is_needed(tmp_path, repository):
    """The same bits from code compiled for a processor without FMA, where `a * b + c` is rounded twice."""
    a, b, c = multiply_add_cases(RNG(12), 2000)
    packed = random_blocks("Q2_K", (30, 6), RNG(13))
    x = RNG(14).normal(size=(4, 1536)).astype(np.float32)
    given, made = tmp_path / "given.npz", tmp_path / "made.npz"
    np.savez(given, a=a, b=b, c=c, packed=packed, x=x)
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=AVX", "APRJAX_COMPILATION_CACHE": "off"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_FMA, given, made],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(made) as found:
        np.testing.assert_array_equal(bits(found["naive"]), bits(a * b + c))
        np.testing.assert_array_equal(bits(found["fused"]), bits(floats.fused_multiply_add(a, b, c)))
        np.testing.assert_array_equal(bits(found["product"]), bits(vec_dot("Q2_K", packed, x[:, None])))


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_gradients_pass_straight_through(name):
    blocks = FORMATS[name]
    if blocks.quantized:
        packed = random_blocks(name, (12, 512 // blocks.block_size), RNG(15))
    else:
        packed = encode(name, RNG(15).normal(size=(12, 512)).astype(np.float32)).reshape(12, 512, -1)
    x, y = (RNG(16).normal(size=(3, width)).astype(np.float32) for width in (512, 12))
    relaid = relay(name, packed)
    gradient = jax.jit(jax.grad(lambda x: (exact_matmul(name, relaid, x) * y).sum()))(x)
    other = integer_matmul if blocks.quantized else float_matmul
    expected = jax.jit(jax.grad(lambda x: (other(name, relaid, x) * y).sum()))(x)
    np.testing.assert_array_equal(gradient, expected)


def test_gradients_of_float_dots_and_multiply_adds():
    rng = RNG(17)
    left, right = rng.normal(size=(2, 1, 3, 64)).astype(np.float32), rng.normal(size=(4, 5, 64)).astype(np.float32)
    weights = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    found = jax.jit(jax.grad(lambda *sides: (exact_dot_f32(*sides) * weights).sum(), argnums=(0, 1)))(left, right)
    expected = (
        np.einsum("zhmk,hkn->zmn", weights, right)[:, None],
        np.einsum("zhmk,zmn->hkn", weights, left[:, 0]),
    )
    for one, other in zip(found, expected, strict=True):
        # float32 sums of at most 20 terms.
        assert relative_rms(np.asarray(one) - other, other) < 1e-6
    a, b, c = (jnp.float32(value) for value in (3, 5, 7))
    assert jax.jit(jax.grad(fused_multiply_add, argnums=(0, 1, 2)))(a, b, c) == (5, 3, 1)


def test_a_large_head_needs_little_working_memory():
    """151,936 rows, 79 tokens, as compiled: besides arguments and result less than 100 MB."""
    rows, columns, tokens = 151_936, 896, 79
    chunks, chunk_rows = chunk_layout(rows, columns)
    assert chunks * chunk_rows == rows
    piece = jax.eval_shape(
        lambda packed: relay_module.relay_traced("Q8_0", packed),
        jax.ShapeDtypeStruct((chunk_rows, columns // 32, 34), jnp.uint8),
    )
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((chunks, *leaf.shape), leaf.dtype), piece)
    relaid = relay_module.replace(stacked, rows=rows)
    x = jax.ShapeDtypeStruct((tokens, columns), jnp.float32)
    analysis = exact.lower("Q8_0", relaid, x).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 100e6


def test_misuse_is_named():
    q4_k = relay("Q4_K", np.zeros((4, 1, 144), np.uint8))
    with pytest.raises(ValueError, match="re-laid as Q4_K, asked to multiply as Q5_K"):
        exact_matmul("Q5_K", q4_k, jnp.zeros((2, 256)))
    with pytest.raises(ValueError, match=r"Q4_K weights take x\[tokens, 256\], found \[2, 512\]"):
        exact_matmul("Q4_K", q4_k, jnp.zeros((2, 512)))
    with pytest.raises(ValueError, match="AprQ4 is no type of ggml's"):
        exact_matmul("AprQ4", relay("AprQ4", np.zeros((4, 1, 18), np.uint8)), jnp.zeros((2, 32)))
    with pytest.raises(ValueError, match=r"found \[2, 32\] and \[3, 64\]"):
        exact_dot_f32(jnp.zeros((2, 32)), jnp.zeros((3, 64)))
