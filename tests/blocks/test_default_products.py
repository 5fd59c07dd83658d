"""The default build's products, twins and JAX, against ggml's own graphs, to the bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from aprjax.blocks import FORMATS
from aprjax.blocks import default_twins as twins
from aprjax.blocks import exact_default as exact
from aprjax.blocks.exact import exact_matmul
from aprjax.blocks.relay import relay
from aprjax.blocks.twins import vec_dot

from .support import adversarial_weights, bits, random_blocks, run_jobs, value_cases

RNG = np.random.default_rng
WIDTH, ROWS = 512, 64
# A batch's rows by fours, and what is left over; fewer than four; fewer than tiles take; one.
BATCHES = (11, 7, 3, 1)
PLAIN = ("F32", "F16")

matmul = jax.jit(exact_matmul, static_argnames=("name", "kernel"))


def weights_and_activations() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By type random rows and adversarial ones; activations with ties of both signs, zeros, one dominating channel."""
    weights = {}
    for name in dict.fromkeys((*twins.TILED, *twins.REPACKED)):
        rows = random_blocks(name, (ROWS, WIDTH // FORMATS[name].block_size), RNG(1))
        hard = adversarial_weights(name, WIDTH, RNG(2))
        weights[name] = np.concatenate([rows, hard[: len(hard) // 8 * 8]])
    values = RNG(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    weights |= {"F32": values, "F16": values.astype(np.float16)}
    cases = value_cases(RNG(4))
    kinds = ("tied extremes", "zero", "one-hot", "half integers", "all negative", "groups far apart")
    hard = np.stack([np.resize(cases[kind][0], WIDTH) for kind in kinds])
    x = np.concatenate([RNG(5).standard_t(3, (max(BATCHES) - len(hard), WIDTH)).astype(np.float32), hard])
    x[np.abs(x) < 1e-30] = 0  # below that ggml's own codes are undefined (activations.py)
    return weights, np.ascontiguousarray(np.roll(x, 2, axis=0))


@pytest.fixture(scope="module")
def engine(llama_build: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], np.ndarray]:
    """Of the AVX2 build: by kernels available, type and batch, the product."""
    weights, x = weights_and_activations()
    results = {}
    for available in ("tiled", "repack"):
        keys = [
            (available, name, batch)
            for name in (twins.REPACKED if available == "repack" else (*twins.TILED, *PLAIN))
            for batch in BATCHES
        ]
        jobs = [
            {
                "kind": "product",
                "type": FORMATS[name].ggml_id,
                "repack": available == "repack",
                "weights": name,
                "x": f"x{batch}",
            }
            for _, name, batch in keys
        ]
        arrays = {**weights, **{f"x{batch}": x[:batch] for batch in BATCHES}}
        made = run_jobs(llama_build("avx2"), jobs, arrays, tiled=True, folder=tmp_path_factory.mktemp(available))
        results |= dict(zip(keys, made, strict=True))
    return results


def twin_of(kernel: exact.ProductKernel, name: str, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    if kernel.integers == "tiled":
        return twins.tiled_dot(name, weights, x[:, None])
    if kernel.integers == "repack":
        return twins.repacked_matmul(name, weights, x)
    if name in PLAIN:
        x = x.astype(weights.dtype).astype(np.float32)
        return twins.one_register_dot(x[:, None], weights.astype(np.float32), lanes=kernel.lanes)
    return vec_dot(name, weights, x[:, None])


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("available", "name"), [*(("tiled", name) for name in twins.TILED), *(("repack", name) for name in twins.REPACKED)]
)
def test_products_of_quantized_weights(available: str, name: str, engine: Any) -> None:
    weights, x = weights_and_activations()
    packed = weights[name]
    took = set()
    for batch in BATCHES:
        expected = bits(engine[available, name, batch])
        kernel = exact.product_kernel(name, rows=len(packed), tokens=batch, available=(available,))
        took.add(kernel.integers)
        np.testing.assert_array_equal(bits(twin_of(kernel, name, packed, x[:batch])), expected, err_msg=str(batch))
        if batch == BATCHES[0]:  # a compilation; it has fours and single rows
            found = matmul(name, relay(name, packed), x[:batch], kernel=kernel)
            np.testing.assert_array_equal(bits(found), expected, err_msg=str(batch))
        if kernel.integers != "vec_dot":
            # The rows can tell: the plain kernel gives other bits.
            assert (bits(vec_dot(name, packed, x[:batch, None])) != expected).any()
    assert took == ({"repack"} if available == "repack" else {"tiled", "vec_dot"})


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", PLAIN)
def test_products_of_float_weights(name: str, engine: Any) -> None:
    weights, x = weights_and_activations()
    packed = weights[name]
    kernel = exact.product_kernel(name, rows=ROWS, tokens=BATCHES[0], available=("tinyblas",))
    assert kernel.registers == 1
    assert exact.product_kernel(name, rows=ROWS, tokens=1, available=("tinyblas",)).registers == 4
    expected = bits(engine["tiled", name, BATCHES[0]])
    found = twin_of(kernel, name, packed, x)
    np.testing.assert_array_equal(bits(found), expected)
    relaid = relay(name, packed.view(np.uint8).reshape(ROWS, WIDTH, -1))
    np.testing.assert_array_equal(bits(matmul(name, relaid, x, kernel=kernel)), expected)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"Q5_0 has no such kernel; there are those of Q2_K, "):
        twins.tiled_dot("Q5_0", np.zeros((1, 1, 22), np.uint8), np.zeros((1, 32), np.float32))
