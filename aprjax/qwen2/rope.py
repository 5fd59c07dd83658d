"""Rotation tables, computed on the host: a table is a few kilobytes and libm's bits matter."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int


def rope_tables(
    positions: Int[np.ndarray, " position"],
    *,
    theta: float,
    head_dim: int,
    kind: Literal["closed-form", "iterated", "powf"] = "closed-form",
    dtype: str = "float32",
) -> tuple[Float[np.ndarray, "position half"], Float[np.ndarray, "position half"]]:
    """Cosines and sines of every position's angles.

    `closed-form`: `position * theta^(-2i/d)` in double precision, rounded once to `dtype`.
    `iterated`: as ggml (`ggml_rope_cache_init`): float32 `angle[0] = position`,
    `angle[i+1] = angle[i] * powf(theta, -2/d)`, then libm's cosf and sinf.
    `powf`: as realizar: float32 `position * (1 / powf(theta, 2i/d))`, then libm's cosf and sinf.
    """
    if kind == "closed-form":
        exponents = -2.0 * np.arange(head_dim // 2, dtype=np.float64) / head_dim
        angles = np.asarray(positions, np.float64)[:, None] * np.power(float(theta), exponents)
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    cosf, sinf, powf = _libm()
    positions = np.asarray(positions, np.float32)
    if kind == "powf":
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = [powf(np.float32(theta), exponent) for exponent in exponents]
        angles = positions[:, None] * (np.float32(1) / np.asarray(powers, np.float32))
    else:
        angles = _iterated(positions, powf(np.float32(theta), np.float32(-2.0) / np.float32(head_dim)), head_dim // 2)
    flat = angles.ravel().tolist()
    cos = np.fromiter(map(cosf, flat), np.float32, angles.size).reshape(angles.shape)
    sin = np.fromiter(map(sinf, flat), np.float32, angles.size).reshape(angles.shape)
    return cos.astype(dtype), sin.astype(dtype)


def _iterated(positions: np.ndarray, scale: float, count: int) -> np.ndarray:
    """`positions * scale^i`, each float32 power rounded from the one before."""
    columns = [positions]
    for _ in range(count - 1):
        columns.append(columns[-1] * np.float32(scale))
    return np.stack(columns, axis=1)


@cache
def _libm():
    """The C library's cosf, sinf and powf; double precision rounded once where there is none to load.

    The two differ by one unit in the last place in about 0.5 % of entries (measured in kernels.md, 4).
    """
    path = ctypes.util.find_library("m")
    if path is None:
        return math.cos, math.sin, lambda base, power: float(base) ** float(power)
    library = ctypes.CDLL(path)
    for name, arguments in (("cosf", 1), ("sinf", 1), ("powf", 2)):
        function = getattr(library, name)
        function.restype = ctypes.c_float
        function.argtypes = [ctypes.c_float] * arguments
    return library.cosf, library.sinf, library.powf
