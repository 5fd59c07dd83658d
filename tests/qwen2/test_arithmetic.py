"""Each choice of an `Arithmetic` changes the operations that read it, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aprjax.blocks import encode
from aprjax.blocks.relay import relay
from aprjax.qwen2 import PRESETS, Arithmetic, UnknownArithmetic, kernels, preset
from aprjax.qwen2.rope import rope_tables

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)
HEADS = X.reshape(8, 4, 64)
KEYS = HEADS[:, :2]
WEIGHTS = {
    kind: relay(kind, encode(kind, np.random.default_rng(1).normal(size=(64, 256))).reshape(64, blocks, -1))
    for kind, blocks in {"Q4_K": 1, "Q6_K": 1, "Q8_0": 8, "F32": 256}.items()
}
VISIBLE = jnp.tril(jnp.ones((8, 8), bool))
PROBABILITIES = jnp.full((4, 8, 8), 0.125)
TABLES = rope_tables(np.arange(8), theta=1e6, head_dim=64)

OPERATIONS: dict[str, Callable[[Arithmetic], Any]] = {
    "norm": lambda a: kernels.rms_norm(X, X[0], jnp.float32(1e-6), a),
    "rotate": lambda a: kernels.rotate(HEADS, *map(jnp.asarray, TABLES), "neox", a),
    "scores": lambda a: kernels.attention_scores(HEADS, KEYS, a),
    "softmax": lambda a: kernels.masked_softmax(PROBABILITIES, VISIBLE, a),
    "values": lambda a: kernels.weighted_values(PROBABILITIES, KEYS, a),
    "silu": lambda a: kernels.silu(X, a),
    "add": lambda a: kernels.add(X, X, a),
    "multiply": lambda a: kernels.multiply(X, X, a),
    **{kind: lambda a, w=weight: kernels.matmul(w, X, a) for kind, weight in WEIGHTS.items()},
}
QUANTIZED = {"Q4_K", "Q6_K", "Q8_0"}
SUMS = {"norm", "scores", "softmax", "values"}


def program(operation: str, arithmetic: Arithmetic) -> str:
    """What is computed, as text: equal texts are the same operations in the same order."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda: OPERATIONS[operation](arithmetic))()))


@pytest.mark.parametrize(
    ("choice", "other", "readers"),
    [
        ("norm", "float", {"norm"}),
        ("norm", "lanes", {"norm"}),
        ("norm", "sequential", {"norm"}),
        ("rotation", "separate", {"rotate"}),
        ("rotation", "compiled", {"rotate"}),
        ("exponential", "library", {"softmax", "silu"}),
        ("softmax", "sequential", {"softmax"}),
        ("softmax", "float", {"softmax"}),
        ("matmul", "dequantize", QUANTIZED),
        ("matmul", "integer-as-float", QUANTIZED),
        ("activations", "realizar", QUANTIZED),
        ("activations", "per 32", QUANTIZED),
        ("activations", "per 256", QUANTIZED),
        ("exact", True, SUMS | QUANTIZED | {"F32", "silu", "add", "multiply"}),
        ("rope", "powf", set()),  # read when the tables are made: test_rope.py
        ("kv_cache", "float16", set()),  # read where keys and values are stored: test_exact.py
        ("name", "another", set()),
    ],
)
def test_a_choice_changes_the_operations_that_read_it_and_no_others(choice: str, other: Any, readers: set[str]) -> None:
    base = PRESETS["llama.cpp"]
    changed = replace(base, **{choice: other})
    assert {name for name in OPERATIONS if program(name, base) != program(name, changed)} == readers


@pytest.mark.parametrize(
    ("choice", "other", "readers"),
    [
        ("kernels", ("repack",), {"Q4_K"}),
        ("kernels", ("tiled",), {"Q4_K", "Q6_K"}),
        ("kernels", ("tinyblas",), {"F32", "values"}),
        ("vectors", "avx512", {"softmax", "silu", "scores", "values", "F32"}),
        ("attention", "flash", set()),  # read where the three operations are one: test_flash.py
    ],
)
def test_a_builds_kernels_change_the_operations_that_run_on_them(choice: str, other: Any, readers: set[str]) -> None:
    base = PRESETS["llama.cpp-exact"]
    changed = replace(base, **{choice: other})
    assert {name for name in OPERATIONS if program(name, base) != program(name, changed)} == readers
    fast = replace(base, exact=False), replace(changed, exact=False)
    assert [name for name in OPERATIONS if program(name, fast[0]) != program(name, fast[1])] == []


def test_float64_knows_no_engines_rounding() -> None:
    with jax.enable_x64(True):
        plain = replace(PRESETS["llama.cpp"], dtype="float64", matmul="integer-as-float")
        for choice, other in (("norm", "lanes"), ("softmax", "float"), ("exponential", "library"), ("exact", True)):
            changed = replace(plain, **{choice: other})
            assert [name for name in OPERATIONS if program(name, plain) != program(name, changed)] == []


def test_realizar_multiplies_some_types_by_codes_and_others_by_floats() -> None:
    """kernels.md section 7: Q4_K and Q8_0 take quantized activations; Q6_K takes them as they are."""
    floats, codes = replace(PRESETS["realizar"], matmul="dequantize"), PRESETS["realizar"]
    assert {kind for kind in WEIGHTS if program(kind, floats) != program(kind, codes)} == {"Q4_K", "Q8_0"}
    integers = PRESETS["realizar-integer"]
    assert {kind for kind in WEIGHTS if program(kind, codes) != program(kind, integers)} == {"Q4_K", "Q8_0"}


def test_presets_are_known_by_their_names() -> None:
    assert all(preset(name).name == name for name in PRESETS)
    assert PRESETS["llama.cpp-exact"] == replace(PRESETS["llama.cpp"], name="llama.cpp-exact", exact=True)
    with pytest.raises(UnknownArithmetic, match=r"known: float32, float64, llama\.cpp"):
        preset("cuda")
