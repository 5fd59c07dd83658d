"""The fast product's bits are those of a NumPy specification: no compiler's contraction has a say in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aprjax.blocks import FORMATS
from aprjax.blocks.activations import QUANTIZERS
from aprjax.blocks.dot import integer_matmul
from aprjax.blocks.relay import relay
from aprjax.blocks.roundings import LARGEST_INTEGER, difference_of_products

from .support import QUANTIZED, bits, random_blocks

F32 = np.float32


def specified(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`integer_matmul` in NumPy, which rounds every operation: for at most 16 blocks, one run of them."""
    fields, quantized = FORMATS[name].unpack(packed), QUANTIZERS[FORMATS[name].activation](x)
    codes, activations = fields.codes.astype(np.int64), quantized.codes.astype(np.int64)
    if fields.group_scales is not None:
        codes = codes * fields.group_scales[..., None]
    integers = np.einsum("nbk,tbk->btn", codes.reshape(*codes.shape[:2], -1), activations)
    total = np.zeros(integers.shape[1:], F32)
    for block, whole in enumerate(integers):
        outer, scale = quantized.scale[:, block, None], fields.scale[:, block]
        if fields.group_minimums is not None:
            groups = fields.group_minimums.shape[-1]
            sums = activations[:, block].reshape(len(x), groups, -1).sum(-1)
            lows = sums @ fields.group_minimums[:, block].T.astype(np.int64)
            minimum = fields.minimum[:, block]
            high = scale * (whole >> 13).astype(F32) - minimum * (lows >> 13).astype(F32)
            low = scale * (whole & 8191).astype(F32) - minimum * (lows & 8191).astype(F32)
            total = total + outer * (high * F32(8192) + low)
            continue
        total = total + outer * scale * whole.astype(F32)
        if fields.minimum is not None:
            total = total - quantized.sums[:, block, None] * fields.minimum[:, block]
    return total


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_product_has_the_bits_of_its_specification(name: str) -> None:
    packed = random_blocks(name, (24, 512 // FORMATS[name].block_size), np.random.default_rng(21))
    x = np.random.default_rng(22).standard_t(3, (6, 512)).astype(F32)
    found = jax.jit(integer_matmul, static_argnums=0)(name, relay(name, packed), x)
    np.testing.assert_array_equal(bits(found), bits(specified(name, packed, x)))


def test_a_difference_keeps_what_two_rounded_terms_lose() -> None:
    random = np.random.default_rng(23)
    integers = random.integers(-LARGEST_INTEGER + 1, LARGEST_INTEGER, 20_000).astype(np.int32)
    scale = random.uniform(1, 2, integers.size).astype(np.float16).astype(F32)
    minimum = random.uniform(1, 2, integers.size).astype(np.float16).astype(F32)
    # Terms that nearly cancel, as those of a block do.
    lows = np.clip(integers * (scale / minimum) * F32(0.99), 1 - LARGEST_INTEGER, LARGEST_INTEGER - 1).astype(np.int32)
    exact = scale.astype(float) * integers - minimum.astype(float) * lows
    found = np.asarray(jax.jit(difference_of_products)(*map(jnp.asarray, (scale, integers, minimum, lows))))
    rounded = scale * integers.astype(F32) - minimum * lows.astype(F32)
    # Three roundings of numbers that are no larger than about the difference: three halves of 2^-23.
    assert np.abs(found - exact).max() <= 1.5 * 2**-23 * np.abs(exact).max()
    assert np.linalg.norm(rounded - exact) > 10 * np.linalg.norm(found - exact)
