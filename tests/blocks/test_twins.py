"""The NumPy twins of ggml's dots against ggml's own routines, to the bit; the fused multiply-add against libm's."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest

from aprjax.blocks import FORMATS
from aprjax.blocks import float_twins as floats
from aprjax.blocks.float_twins import fused_multiply_add
from aprjax.blocks.twins import vec_dot

from .support import QUANTIZED, adversarial_weights, bits, ggml_float_dots, ggml_matmul, random_blocks, value_cases

RNG = np.random.default_rng
FLOAT_TWINS = {"F32": floats.vec_dot_f32, "F16": floats.vec_dot_f16, "BF16": floats.vec_dot_bf16}


def multiply_add_cases(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands whose product and sum overlap in every way, and exact ties with a last bit far below."""
    wide = [rng.normal(size=count) * 2.0 ** rng.integers(-60, 60, count) for _ in range(3)]
    # Integers times scales onto sums of like size, as in the dots.
    dots = [rng.normal(size=count), rng.integers(-(1 << 22), 1 << 22, count), rng.normal(size=count) * 2.0**20]
    # c ends just where the product begins: half a unit of c's last place plus or minus up to 2^-47 of it.
    signs = rng.choice([-1, 1], count)
    ties = [
        (1 + rng.integers(-3, 4, count) * 2.0**-23) * signs,
        1 + rng.integers(-3, 4, count) * 2.0**-23,
        rng.integers(1 << 23, 1 << 24, count) * 2.0 * rng.choice([-1, 1], count),
    ]
    columns = [np.concatenate(parts).astype(np.float32) for parts in zip(wide, dots, ties, strict=True)]
    return columns[0], columns[1], columns[2]


def libm_fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return np.array([fmaf(*operands) for operands in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float32)


def test_fused_multiply_add_rounds_once():
    a, b, c = multiply_add_cases(RNG(1), 4000)
    expected = libm_fused(a, b, c)
    np.testing.assert_array_equal(bits(fused_multiply_add(a, b, c)), bits(expected))
    # The cases can tell: rounding twice, in float32 or by way of float64, is wrong on some of them.
    assert (a * b + c != expected).any()
    assert ((a.astype(float) * b + c).astype(np.float32) != expected).any()


def test_fused_multiply_add_at_the_ends_of_the_range():
    tiny, least, huge = np.float32(2**-126), np.float32(2**-149), np.float32(3.4028235e38)
    special = np.array([0, -0.0, 1, -1, least, -least, tiny, 1.5 * least, 2**-75, huge, -huge, np.inf, -np.inf, np.nan])
    a, b, c = (axis.ravel() for axis in np.meshgrid(*[special.astype(np.float32)] * 3, indexing="ij"))
    np.testing.assert_array_equal(bits(fused_multiply_add(a, b, c)), bits(libm_fused(a, b, c)))
    rng = RNG(2)
    a, b, c = (
        rng.normal(size=4000) * 2.0 ** rng.integers(low, high, 4000)
        for low, high in ((-90, -60),) * 2 + ((-149, -120),)
    )
    a, b, c = a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)
    expected = libm_fused(a, b, c)
    assert (np.abs(expected) < tiny).sum() > 500
    np.testing.assert_array_equal(bits(fused_multiply_add(a, b, c)), bits(expected))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", QUANTIZED)
def test_twins_equal_ggml_on_random_rows(name, llama_library):
    packed = random_blocks(name, (200, 1024 // FORMATS[name].block_size), RNG(3))
    # Scales of any bits: infinities and NaN among them.
    packed[100:] = random_blocks(name, packed[100:].shape[:2], RNG(4), finite=False)
    x = RNG(5).standard_t(3, (3, 1024)).astype(np.float32)
    expected = ggml_matmul(llama_library.cpu, name, packed, x)
    np.testing.assert_array_equal(bits(vec_dot(name, packed, x[:, None])), bits(expected))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", QUANTIZED)
def test_twins_equal_ggml_on_adversarial_rows(name, llama_library):
    """Saturated codes; zero, subnormal and huge scales; activations all equal, tied at ±max, sparse, far apart."""
    packed = adversarial_weights(name, 1024, RNG(6))
    for case, values in value_cases(RNG(7)).items():
        # Below 1e-36, but not zero, ggml's codes are undefined: see activations.py.
        largest = np.abs(values).reshape(len(values), -1, 32).max(axis=-1)
        defined = values[((largest > 1e-36) | (largest == 0)).all(axis=1)]
        x = defined[:3]
        assert len(x)
        expected = ggml_matmul(llama_library.cpu, name, packed, x)
        np.testing.assert_array_equal(bits(vec_dot(name, packed, x[:, None])), bits(expected), err_msg=case)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", sorted(FLOAT_TWINS))
def test_float_twins_equal_ggml(name, llama_library):
    """Whole steps of 32 and every remainder."""
    for width in (*range(1, 65), 95, 127, 128, 896, 1001):
        rng = RNG(width)
        left, right = rng.normal(size=(2, 40, width)).astype(np.float32) * 10.0 ** rng.uniform(-3, 3, (2, 40, 1))
        left, right = left.astype(np.float32), right.astype(np.float32)
        expected = ggml_float_dots(llama_library.cpu, name, left, right)
        np.testing.assert_array_equal(bits(FLOAT_TWINS[name](left, right)), bits(expected), err_msg=str(width))


def test_misuse_of_twins_is_named():
    with pytest.raises(ValueError, match="IQ4_XS has no twin; there are Q4_0, "):
        vec_dot("IQ4_XS", np.zeros((1, 136), np.uint8), np.zeros(256, np.float32))
    with pytest.raises(ValueError, match=r"Q4_K weights of 2 blocks take x\[…, 512\], found \[256\]"):
        vec_dot("Q4_K", np.zeros((2, 144), np.uint8), np.zeros(256, np.float32))
    with pytest.raises(ValueError, match="widths differ: 3 and 4"):
        floats.vec_dot_f32(np.zeros(3, np.float32), np.zeros(4, np.float32))
