"""Exact products on the rows of real models, and on 10^5 random rows of each type: ggml, twins and JAX, to the bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import aprjax
from aprjax.blocks import FORMATS
from aprjax.blocks.exact import exact_matmul
from aprjax.blocks.relay import relay
from aprjax.blocks.twins import vec_dot

from .support import QUANTIZED, bits, ggml_matmul, random_blocks

pytestmark = [pytest.mark.real_model, pytest.mark.llama_cpp]

RNG = np.random.default_rng
exact = jax.jit(exact_matmul, static_argnums=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_rows(name, llama_library):
    """100,000 rows of 512 elements by one activation row of heavy tails, ten times over."""
    blocks = FORMATS[name]
    for seed in range(10):
        packed = random_blocks(name, (10_000, 512 // blocks.block_size), RNG(seed))
        # Scales of any size, as float16 has them, on a tenth of the rows.
        packed[:1000] = random_blocks(name, packed[:1000].shape[:2], RNG(seed + 10), finite=False)
        x = RNG(seed + 20).standard_t(2, (1, 512)).astype(np.float32)
        expected = bits(ggml_matmul(llama_library.cpu, name, packed, x))
        np.testing.assert_array_equal(bits(vec_dot(name, packed, x[:, None])), expected)
        np.testing.assert_array_equal(bits(exact(name, relay(name, packed), x)), expected)


@pytest.mark.parametrize(
    ("model", "types"),
    [
        ("qwen2.5-coder-0.5b", {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}),
        ("qwen2.5-coder-1.5b", {"Q4_K", "Q6_K"}),
    ],
)
def test_rows_of_real_models(model, types, model_path, llama_library):
    """64 rows from all over every quantized matrix by three tokens, the last dominated by one channel."""
    seen = set()
    rng = RNG(30)
    for tensor in aprjax.open(model_path(model)).tensors.values():
        name = tensor.block_type
        if FORMATS[name].activation is None or len(tensor.shape) != 2:
            continue
        packed = tensor.packed()
        chosen = np.ascontiguousarray(packed[np.sort(rng.choice(len(packed), 64, replace=False))])
        x = rng.standard_t(3, (3, tensor.shape[1])).astype(np.float32)
        x[2, rng.integers(tensor.shape[1])] = 800
        expected = bits(ggml_matmul(llama_library.cpu, name, chosen, x))
        np.testing.assert_array_equal(bits(vec_dot(name, chosen, x[:, None])), expected, err_msg=tensor.name)
        np.testing.assert_array_equal(bits(exact(name, relay(name, chosen), x)), expected, err_msg=tensor.name)
        seen.add(name)
    assert seen == types


def test_the_whole_head(model_path, llama_library):
    """All 151,936 rows of the 0.5B's output matrix by one token: pieces and chunks of the size they have in use."""
    tensor = aprjax.open(model_path("qwen2.5-coder-0.5b")).tensors["lm_head.weight"]
    x = RNG(31).normal(size=(1, tensor.shape[1])).astype(np.float32)
    packed = tensor.packed()
    expected = ggml_matmul(llama_library.cpu, tensor.block_type, packed, x)
    found = exact(tensor.block_type, relay(tensor.block_type, packed), x)
    np.testing.assert_array_equal(bits(found), bits(expected))
