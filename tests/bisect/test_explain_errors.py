"""The error that `explain` states of a number covers the truth: numbers planted in float32, in engines' own orders.

What computes them here is NumPy in float32 and shares nothing with `explain`: one node, from inputs drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint

from aprjax.bisect.explain.evaluation import Applied
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Node, Parameter
from aprjax.bisect.explain.registry import HYPOTHESES
from aprjax.bisect.replay.report import ReplayReport
from aprjax.bisect.report import Verdict
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.trace import MemoryTrace, TraceInfo

F = np.float32
HEADS, KV_HEADS, WIDTH = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
Values = dict[Node, np.ndarray]
# Compiled programs, by the number of positions: every evidence of as many shares them.
PROGRAMS: dict[int, dict[Any, Any]] = {}


@cache
def file() -> Checkpoint:
    return tiny_checkpoint(CONFIG)


def draw(generator: np.random.Generator, count: int, width: int, size: float = 1.0) -> np.ndarray:
    """Rows of different sizes."""
    return (generator.normal(size=(count, width)) * size * generator.lognormal(0, 0.5, (count, 1))).astype(F)


def angles_of_llama_cpp(theta: float, count: int) -> np.ndarray:
    """`ggml_rope_cache_init`: one factor in float32, from channel to channel."""
    step, angle, out = F(np.power(F(theta), F(-2 / WIDTH))), np.arange(count, dtype=F), []
    for _ in range(WIDTH // 2):
        out.append(angle)
        angle = (angle * step).astype(F)
    return np.stack(out, axis=1)


def angles_of_torch(theta: float, count: int) -> np.ndarray:
    """Every frequency a reciprocal of a power, in float32."""
    exponents = np.arange(0, WIDTH, 2, dtype=F) / F(WIDTH)
    return np.arange(count, dtype=F)[:, None] * (F(1) / np.power(F(theta), exponents)).astype(F)


def angles_by_logarithm(theta: float, count: int) -> np.ndarray:
    """Every frequency an exponential of a multiple of the logarithm, in float32."""
    exponents = -np.arange(WIDTH // 2, dtype=F) * F(2 / WIDTH) * np.log(F(theta))
    return np.arange(count, dtype=F)[:, None] * np.exp(exponents.astype(F))


def rotated(qkv: np.ndarray, angles: np.ndarray) -> np.ndarray:
    q = qkv[:, : HEADS * WIDTH].reshape(len(qkv), HEADS, WIDTH)
    cos, sin = (f(angles).astype(F)[:, None] for f in (np.cos, np.sin))
    first, second = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(len(qkv), -1)


def rope(angles: Callable[[float, int], np.ndarray]) -> Callable[..., Values]:
    def plant(generator: np.random.Generator, count: int, theta: float) -> Values:
        qkv = draw(generator, count, (HEADS + 2 * KV_HEADS) * WIDTH)
        return {(0, Stage.QKV_BIAS): qkv, (0, Stage.Q_POST_ROPE): rotated(qkv, angles(theta, count))}

    return plant


def stretched(generator: np.random.Generator, count: int, factor: float) -> Values:
    qkv = draw(generator, count, (HEADS + 2 * KV_HEADS) * WIDTH)
    angles = angles_of_llama_cpp(CONFIG.rope_theta, count) * F(factor)
    return {(0, Stage.QKV_BIAS): qkv, (0, Stage.Q_POST_ROPE): rotated(qkv, angles.astype(F))}


def mean_of_ggml(squares: np.ndarray) -> np.ndarray:
    return squares.astype(np.float64).mean(axis=1).astype(F)


def mean_one_by_one(squares: np.ndarray) -> np.ndarray:
    return (np.cumsum(squares, axis=1, dtype=F)[:, -1] / F(squares.shape[1])).astype(F)


def norm(mean: Callable[[np.ndarray], np.ndarray], size: float) -> Callable[..., Values]:
    def plant(generator: np.random.Generator, count: int, eps: float) -> Values:
        x = draw(generator, count, CONFIG.hidden_size, size)
        weight = file().tensors["model.layers.0.input_layernorm.weight"].decode().astype(F)
        scale = F(1) / np.sqrt(mean(np.square(x)) + F(eps))
        return {(OUTSIDE, Stage.EMBEDDING): x, (0, Stage.ATTN_NORM): x * scale[:, None] * weight}

    return plant


def scored(change: Callable[[np.ndarray, float], np.ndarray]) -> Callable[..., Values]:
    def plant(generator: np.random.Generator, count: int, number: float) -> Values:
        q, k = draw(generator, count, HEADS * WIDTH), draw(generator, count, KV_HEADS * WIDTH)
        keys = np.repeat(k.reshape(count, KV_HEADS, WIDTH), HEADS // KV_HEADS, axis=1)
        products = np.einsum("phd,khd->phk", q.reshape(count, HEADS, WIDTH), keys).astype(F)
        scores = change(products, number).astype(F).reshape(count, -1)
        return {(0, Stage.Q_POST_ROPE): q, (0, Stage.K_POST_ROPE): k, (0, Stage.ATTN_SCORES): scores}

    return plant


def capped(products: np.ndarray, cap: float) -> np.ndarray:
    return F(cap) * np.tanh(products * F(WIDTH**-0.5) / F(cap))


def warmer(generator: np.random.Generator, count: int, factor: float) -> Values:
    scores = generator.normal(size=(count, HEADS, count)).astype(F)
    seen = np.tri(count, dtype=bool)[:, None]
    exponents = np.where(seen, scores * F(factor), F(-np.inf))
    powers = np.exp(exponents - exponents.max(axis=-1, keepdims=True))
    weights = powers / powers.sum(axis=-1, keepdims=True)
    return {(0, Stage.ATTN_SCORES): scores.reshape(count, -1), (0, Stage.ATTN_SOFTMAX): weights.reshape(count, -1)}


def joined(generator: np.random.Generator, count: int, factor: float) -> Values:
    x, branch = (draw(generator, count, CONFIG.hidden_size) for _ in range(2))
    total = x + branch * F(factor)
    return {(0, Stage.POST_ATTN_RESIDUAL): x, (0, Stage.FFN_OUT): branch, (0, Stage.POST_FFN_RESIDUAL): total}


@dataclass(frozen=True)
class Case:
    """What is planted: the hypothesis, the range of its number (drawn in its logarithm), and who computes with it."""

    slug: str
    low: float
    high: float
    plant: Callable[[np.random.Generator, int, float], Values]
    least: int = 2


CASES: Mapping[str, Case] = {
    "theta, as llama.cpp": Case("rope-theta", 500, 5e7, rope(angles_of_llama_cpp)),
    "theta, as transformers": Case("rope-theta", 500, 5e7, rope(angles_of_torch)),
    "theta, by its logarithm": Case("rope-theta", 500, 5e7, rope(angles_by_logarithm)),
    "epsilon of small rows": Case("rms-eps", 1e-7, 1e-2, norm(mean_of_ggml, 0.015), 1),
    "epsilon of small rows, summed one by one": Case("rms-eps", 1e-7, 1e-2, norm(mean_one_by_one, 0.015), 1),
    "epsilon that hardly shows": Case("rms-eps", 1e-7, 1e-2, norm(mean_one_by_one, 1.0), 1),
    "positions": Case("rope-scaling", 0.2, 2.2, stretched),
    "scale": Case("attn-scale", 0.05, 0.5, scored(lambda products, scale: products * F(scale))),
    "cap": Case("attn-softcap", 2, 20, scored(capped)),
    "temperature": Case("softmax-temperature", 0.5, 1.6, warmer),
    "residual": Case("ffn-branch-scaled", 0.3, 1.8, joined, 1),
}
QUICK = ("theta, as llama.cpp", "epsilon of small rows")


def fitted(slug: str, values: Values, count: int) -> Parameter | None:
    """The hypothesis's own number; None where it finds none that explains the node: none would be stated."""
    everyone = tuple(range(count))
    info = TraceInfo(
        path="planted",
        sha256="0" * 64,
        format="gguf",
        arithmetic="float32",
        tokens=(5,) * count,
        positions=everyone,
        head_positions=everyone,
    )
    nothing = ReplayReport(Verdict.DIVERGENCE, "", {}, {}, ("float32",), count, (), {}, (), 0.0)
    evidence = Evidence(MemoryTrace(info, values), file(), PRESETS["float32"], nothing)
    evidence.programs = PROGRAMS.setdefault(count, {})
    hypothesis = next(one for one in HYPOTHESES if one.id == slug)
    node = list(values)[-1]
    candidate = next(iter(hypothesis.test(evidence, node)), None)
    if candidate is None:
        return None
    left = evidence.residual(node, evidence.base.with_change(Applied(candidate.change, hypothesis.stages)))
    found = next(iter(candidate.parameters.values()))
    assert isinstance(found, Parameter)
    # Planted numbers are found to float32's rounding, or not at all.
    return found if left < 1e-5 else None


def misses(name: str, count: int, draws: int) -> list[tuple[float, float, float]]:
    """Of planted numbers, how far the fit is off and the error that it states, both relative; and the number."""
    case, generator, found = CASES[name], np.random.default_rng(), []
    for _ in range(draws):
        true = float(F(np.exp(generator.uniform(np.log(case.low), np.log(case.high)))))
        number = fitted(case.slug, case.plant(generator, count, true), count)
        if number is not None:
            assert number.error is not None
            found.append((abs(number.value - true) / true, number.error / true, true))
    return found


@pytest.mark.parametrize("name", QUICK)
def test_the_stated_error_covers_the_planted_number(name: str) -> None:
    found = misses(name, 11, 8)
    assert len(found) == 8
    assert all(off <= error for off, error, _ in found), found
    # And it is worth stating.
    assert np.median([error for _, error, _ in found]) < 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_stated_errors_cover_numbers_of_every_kind_at_few_and_many_positions(name: str) -> None:
    for count in (CASES[name].least, 11, 48):
        found = misses(name, count, 16)
        assert len(found) >= 12
        assert all(off <= error for off, error, _ in found), (count, found)
