"""The small functions of the NumPy engine, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

F = np.float32


def rounded_to(x: np.ndarray, kind: str) -> np.ndarray:
    """Rounded to half precision and back; bfloat16 to the nearest, ties to even."""
    if kind == "float16":
        return x.astype(np.float16).astype(F)
    bits = np.ascontiguousarray(x, F).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(F)


def _per_block(x: np.ndarray, size: int, half_scale: bool) -> np.ndarray:
    """Signed bytes with one scale for `size` neighbours, as ggml quantizes activations (Q8_1: the scale in float16)."""
    if x.shape[-1] % size:
        return x
    blocks = x.reshape(-1, size)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scale = largest / F(127)
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    if half_scale:
        scale = rounded_to(scale, "float16")
    return (codes * scale).reshape(x.shape).astype(F)


def _per_256(x: np.ndarray) -> np.ndarray:
    """Q8_K: the element of largest magnitude gets -127 (`quantize_row_q8_K_ref`)."""
    if x.shape[-1] % 256:
        return x
    blocks = x.reshape(-1, 256)
    at = np.abs(blocks).argmax(axis=1)[:, None]
    largest = np.take_along_axis(blocks, at, axis=1)
    inverse = np.divide(F(-127), largest, out=np.zeros_like(largest), where=largest != 0)
    codes = np.minimum(127, np.rint(blocks * inverse))
    scale = np.divide(F(1), inverse, out=np.zeros_like(inverse), where=inverse != 0)
    return (codes * scale).reshape(x.shape).astype(F)


# What activations go through before a product.
PRODUCT_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "activations-per-32": lambda x: _per_block(x, 32, half_scale=True),
    "activations-per-256": _per_256,
    "activations-float16": lambda x: rounded_to(x, "float16"),
    "activations-bfloat16": lambda x: rounded_to(x, "bfloat16"),
}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return F(1) / (F(1) + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _sigmoid(x),
    "activation-gelu": lambda x: (0.5 * x * (1.0 + _erf(x / 2**0.5))).astype(F),
    "activation-gelu-tanh": lambda x: F(0.5) * x * (F(1) + np.tanh(F(0.7978845608) * (x + F(0.044715) * x**3))),
    "activation-quick-gelu": lambda x: x * _sigmoid(F(1.702) * x),
    "activation-relu": lambda x: np.maximum(x, F(0)),
    "activation-hard-swish": lambda x: x * np.clip(x / F(6) + F(0.5), F(0), F(1)),
    "activation-sigmoid": _sigmoid,
    "activation-identity": lambda x: x,
}


def _exponentials(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max(axis=-1, keepdims=True))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = _exponentials(x)
    return e / e.sum(axis=-1, keepdims=True)


def _one_more(x: np.ndarray) -> np.ndarray:
    """A sum with the exponential of a score of zero that no key has."""
    top = np.maximum(x.max(axis=-1, keepdims=True), F(0))
    e = np.exp(x - top)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(-top))


def _base_2(x: np.ndarray) -> np.ndarray:
    e = np.exp2(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _schraudolph(x: np.ndarray) -> np.ndarray:
    """e^x by writing a multiple of x into a float's exponent (Schraudolph 1999; his C = 60801 of 2^20)."""
    shifted = np.maximum(x - x.max(axis=-1, keepdims=True), F(-80))
    words = np.float64(2**23 / np.log(2)) * shifted + 127 * 2**23 - 60801 * 2**3
    e = np.where(np.isfinite(x), words.astype(np.int64).astype(np.int32).view(F), F(0))
    return e / e.sum(axis=-1, keepdims=True)


SOFTMAXES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": _softmax,
    "softmax-not-normalised": _exponentials,
    "softmax-one-more": _one_more,
    "softmax-base-2": _base_2,
    "softmax-schraudolph": _schraudolph,
    "softmax-float16": lambda x: rounded_to(_softmax(x), "float16"),
}
# Factors on the residual stream and on what joins it.
BRANCHES = {
    "output-doubled": (1.0, 2.0),
    "output-missing": (1.0, 0.0),
    "residual-missing": (0.0, 1.0),
    "residual-doubled": (2.0, 1.0),
}
