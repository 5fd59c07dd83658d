"""Flash attention: the NumPy twin against ggml's own operation, JAX against the twin, to the bit."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks.support import run_jobs

from aprjax.bisect.noise.floor import engine_floors
from aprjax.qwen2 import PRESETS, Stage, flash, functional, kernels
from aprjax.qwen2.flash_twins import flash_attention, library_exponential
from aprjax.trace.llama_cpp import LlamaOptions, engine_facts

RNG = np.random.default_rng
Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def case(positions: int, start: int, *, channels: int = 64, heads: int = 4, size: float = 1.0) -> Case:
    """Queries from position `start` on, float16 keys and values in a cache padded as the engine pads it, the mask."""
    rng = RNG(positions)
    q = (rng.normal(size=(positions, heads, channels)) * size).astype(np.float32)
    k, v = rng.normal(size=(2, 256, 2, channels)).astype(np.float16).astype(np.float32)
    return q, k, v, np.arange(256)[None] <= start + np.arange(positions)[:, None]


CASES = {
    "a decoding step": case(1, 77),
    "a short prompt": case(5, 0),
    "after others, sharp": case(20, 100, channels=128, size=4.0),
    "a long prompt": case(70, 0, size=2.0),
    "a long prompt after others": case(65, 40, channels=128),
}


def same(ours: Any, theirs: np.ndarray) -> bool:
    return np.asarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("build", ["avx2", "default"])
def test_the_twin_is_ggmls(build: str, llama_build: Callable[[str], Path], tmp_path: Path) -> None:
    library = llama_build(build)
    features = engine_facts(LlamaOptions(library=str(library)))["system_info"]
    vectors: Literal["avx2", "avx512"] = "avx512" if "AVX512 = 1" in features else "avx2"
    assert build != "avx2" or vectors == "avx2"
    arrays, jobs = {}, []
    for number, (q, k, v, visible) in enumerate(CASES.values()):
        given = {
            "q": q.transpose(1, 0, 2),
            "k": k.transpose(1, 0, 2).astype(np.float16),
            "v": v.transpose(1, 0, 2).astype(np.float16),
            "mask": np.where(visible, 0, -np.inf).astype(np.float16),
        }
        arrays |= {f"{name}{number}": array for name, array in given.items()}
        scale = float(np.float32(1) / np.sqrt(np.float32(q.shape[-1])))
        jobs.append({"kind": "attention", "scale": scale, **{name: f"{name}{number}" for name in given}})
    made = run_jobs(library, jobs, arrays, tiled=False, folder=tmp_path)
    for (name, given), expected in zip(CASES.items(), made, strict=True):
        assert same(flash_attention(*given, vectors=vectors), expected), name


@pytest.mark.parametrize(("name", "vectors"), [("a short prompt", "avx512"), ("a long prompt", "avx2")])
def test_jax_is_the_twin(name: str, vectors: Literal["avx2", "avx512"]) -> None:
    ours = jax.jit(flash.flash_attention, static_argnames="vectors")(*CASES[name], vectors=vectors)
    assert same(ours, flash_attention(*CASES[name], vectors=vectors))


def test_a_long_prompt_without_exact_differs_by_the_order_of_sums() -> None:
    q, k, v, visible = CASES["a long prompt"]
    fast = jax.jit(lambda *given: kernels.flash_attention(*given, PRESETS["llama.cpp-flash"]))(q, k, v, visible)
    expected = flash_attention(q, k, v, visible)
    rows = np.linalg.norm(np.asarray(fast) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # Scores reach some 10: a unit in their last place is 1e-6, and a weight moves by as much. A rounding to float16
    # would be 2.4e-4.
    assert 0 < rows.max() < 1e-5


def test_the_librarys_exponential() -> None:
    expf = ctypes.CDLL(ctypes.util.find_library("m")).expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    edges = np.array([0.0, -0.0, -87.33, -87.34, -103.9, -103.98, -104.5, -200, -np.inf], np.float32)
    spread = [-np.abs(RNG(0).normal(size=5000) * size) for size in (1e-3, 1, 10, 40)]
    x = np.concatenate([edges, *spread]).astype(np.float32)
    expected = np.array([expf(value) for value in x.tolist()], np.float32)
    assert same(library_exponential(x), expected)
    assert same(flash.library_exponential(jnp.asarray(x)), expected)
    # The points can tell: the correctly rounded exponential is another one.
    assert (np.exp(x.astype(np.float64)).astype(np.float32) != expected).any()


def test_the_floor_is_what_the_roundings_to_float16_add_up_to() -> None:
    """`noise.engine_floors`: for an arithmetic without flash attention, of a trace with it."""
    engine = {"flash_attention": "True", "type_v": "f16"}
    plain, fused = PRESETS["llama.cpp-f16"], PRESETS["llama.cpp-flash"]
    for positions in (2, 16, 63):
        q, k, v, visible = case(positions, 0)
        q = q.astype(np.float16).astype(np.float32)  # as the plain attention has them, too
        scores = np.einsum("phc,khc->hpk", q, np.repeat(k, 2, axis=1), dtype=np.float64) / 8
        weights = np.exp(np.where(visible, scores, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("hpk,khc->phc", weights, np.repeat(v, 2, axis=1)).reshape(positions, -1)
        rows = np.linalg.norm(flash_attention(q, k, v, visible) - expected, axis=1) / np.linalg.norm(expected, axis=1)
        floor = engine_floors(engine, (plain,), positions)[Stage.ATTENTION]
        assert 0.4 < rows.max() / floor < 1.2, positions
    assert engine_floors(engine, (fused,), 16) == {}
    assert engine_floors({**engine, "flash_attention": "False"}, (plain,), 16) == {}


def test_gradients_are_those_of_the_equation() -> None:
    q, k, v, visible = (jnp.asarray(array) for array in case(3, 4))
    weights = jnp.asarray(RNG(1).normal(size=(3, 256)).astype(np.float32))

    def attended(q: Any, k: Any, v: Any) -> Any:
        return (kernels.flash_attention(q, k, v, visible, PRESETS["llama.cpp-flash"]) * weights).sum()

    def equation(q: Any, k: Any, v: Any) -> Any:
        probabilities = functional.masked_softmax(functional.attention_scores(q, k), visible)
        return (functional.weighted_values(probabilities, v) * weights).sum()

    found, expected = (jax.jit(jax.grad(function, argnums=(0, 1, 2)))(q, k, v) for function in (attended, equation))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # two programs of the same float32 sums
