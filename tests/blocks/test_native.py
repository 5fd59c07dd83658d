"""The kernel of our own against XLA's program: the same bits for every format, shape, number of tokens and extreme."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprjax.blocks import FORMATS
from aprjax.blocks import relay as relay_module
from aprjax.blocks.dot import integer_matmul
from aprjax.blocks.native.product import FORMATS as NATIVE_FORMATS
from aprjax.blocks.relay import relay

from .support import random_blocks

NAMES = sorted(NATIVE_FORMATS)


def xla(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(_product(name, None, relay(name, packed), x))


def native(name: str, packed: np.ndarray, x: np.ndarray, target: str) -> np.ndarray:
    return np.asarray(_product(name, target, relay(name, packed), x))


def _run(name: str, target: str | None, weights: relay_module.Relaid, x: jax.Array) -> jax.Array:
    return integer_matmul(name, weights, x, native=target)


_product = jax.jit(_run, static_argnums=(0, 1))


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Which of several NaN a processor makes of two is not laid down."""
    absent = np.isnan(one)
    return bool((absent == np.isnan(other)).all()) and one[~absent].tobytes() == other[~absent].tobytes()


def activations(random: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """Of very different sizes, with blocks of zeros."""
    x = random.standard_normal((tokens, columns), dtype=np.float32)
    x *= np.float32(10.0) ** random.integers(-6, 4, (tokens, 1)).astype(np.float32)
    x[:, :256] = 0 if columns > 256 else x[:, :256]
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    # No multiple of a tile of 64 rows, a tile, fewer; the kernel of four and what is left, one token, four.
    [(130, 1280, 7), *(pytest.param(*shape, marks=pytest.mark.thorough) for shape in ((64, 256, 1), (3, 512, 4)))],
)
def test_the_bits_are_those_of_xlas_program(name, rows, columns, tokens, native_target):
    random = np.random.default_rng(rows)
    # Random bytes: all codes, all scales, some of them no numbers.
    packed = random.integers(0, 256, (rows, columns // FORMATS[name].block_size, FORMATS[name].block_bytes), np.uint8)
    x = activations(random, tokens, columns)
    assert same_bits(xla(name, packed, x), native(name, packed, x, native_target))


@pytest.mark.parametrize("name", NAMES)
def test_the_integers_are_exact_at_the_extremes(name, native_target):
    """All bits set or none, activations of one magnitude: the largest sums, which 16 bits would not hold."""
    blocks = FORMATS[name]
    packed = random_blocks(name, (6, 2 * 256 // blocks.block_size), np.random.default_rng(7))
    ones, zeros = packed.copy(), packed.copy()
    # Everything but the scales and minimums of blocks, which stay finite numbers.
    kept = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}.get(name, slice(0, 2))
    for changed, byte in ((ones, 0xFF), (zeros, 0x00)):
        scales = changed[..., kept].copy()
        changed[:] = byte
        changed[..., kept] = scales
    both = np.concatenate([ones, zeros])
    x = np.where(np.arange(5 * 512).reshape(5, 512) % np.array([[2], [3], [513], [7], [512]]), 3.0, -3.0)
    x = x.astype(np.float32)
    assert same_bits(xla(name, both, x), native(name, both, x, native_target))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_chunks_that_are_filled_up(name, native_target, monkeypatch):
    """Rows in several chunks of no multiple of a tile, the last filled up with zeros."""
    monkeypatch.setattr(relay_module, "CHUNK_ROWS", 72)
    random = np.random.default_rng(5)
    packed = random_blocks(name, (211, 2), random)
    x = activations(random, 3, 512)
    weights = relay(name, packed)
    assert weights.chunks * weights.chunk_rows > weights.rows
    assert weights.chunks > 1
    assert same_bits(xla(name, packed, x), native(name, packed, x, native_target))


@pytest.mark.thorough
@settings(deadline=None, max_examples=40)  # every shape is compiled twice
@given(
    name=st.sampled_from(NAMES),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_has_the_same_bits(name, sizes, seed, native_target):
    rows, blocks, tokens = sizes
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows, blocks, FORMATS[name].block_bytes), np.uint8)
    x = activations(random, tokens, blocks * FORMATS[name].block_size)
    assert same_bits(xla(name, packed, x), native(name, packed, x, native_target))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_a_sum_of_one_block_has_no_negative_zero(name, native_target):
    """A negative scale times an exact zero: XLA left out the zero that a sum begins with."""
    blocks = FORMATS[name]
    packed = random_blocks(name, (8, 1), np.random.default_rng(1))
    x = np.zeros((9, blocks.block_size), np.float32)
    both = xla(name, packed, x), native(name, packed, x, native_target)
    assert not np.signbit(both[0]).any()
    assert same_bits(*both)


def test_a_row_hangs_on_no_other_and_a_token_on_none_beside_it(native_target):
    random = np.random.default_rng(3)
    packed, x = random_blocks("Q4_K", (64, 2), random), activations(random, 4, 512)
    whole = native("Q4_K", packed, x, native_target)
    assert same_bits(whole[:, :3], native("Q4_K", packed[:3], x, native_target))
    assert same_bits(whole[2:3], native("Q4_K", packed, x[2:3], native_target))


def test_other_formats_stay_with_xla(native_target):
    random = np.random.default_rng(4)
    packed, x = random_blocks("Q2_K", (8, 1), random), activations(random, 2, 256)
    text = jax.jit(_run, static_argnums=(0, 1)).lower("Q2_K", native_target, relay("Q2_K", packed), x).as_text()
    assert native_target not in text
    text = _product.lower("Q4_K", native_target, relay("Q4_K", random_blocks("Q4_K", (8, 1), random)), x).as_text()
    assert native_target in text


def test_the_gradient_is_that_of_the_decoded_weights(native_target):
    random = np.random.default_rng(6)
    weights, x = relay("Q4_K", random_blocks("Q4_K", (8, 1), random)), activations(random, 4, 256)
    y = jnp.asarray(random.standard_normal((4, 8), dtype=np.float32))

    def loss(x: jax.Array, target: str | None) -> jax.Array:
        return (integer_matmul("Q4_K", weights, x, native=target) * y).sum()

    one, other = (np.asarray(jax.grad(loss)(jnp.asarray(x), target)) for target in (None, native_target))
    assert np.abs(one).max() > 0
    assert same_bits(one, other)


def test_many_at_once(native_target):
    """Threads of a process that multiply at the same time share XLA's pool: none waits for another's work."""
    random = np.random.default_rng(8)
    packed, x = random_blocks("Q6_K", (700, 2), random), activations(random, 4, 512)
    expected = xla("Q6_K", packed, x)
    right: list[bool] = []

    def work() -> None:
        for _ in range(20):
            right.append(same_bits(expected, native("Q6_K", packed, x, native_target)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert right == [True] * 160
