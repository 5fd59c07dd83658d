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
    kind: Literal["closed-form", "iterated"] = "closed-form",
    dtype: str = "float32",
) -> tuple[Float[np.ndarray, "position half"], Float[np.ndarray, "position half"]]:
    """Cosines and sines of every position's angles.

    `closed-form`: `position * theta^(-2i/d)` in double precision, rounded once to `dtype`.
    `iterated`: as ggml (`ggml_rope_cache_init`): float32 `angle[0] = position`,
    `angle[i+1] = angle[i] * powf(theta, -2/d)`, then libm's cosf and sinf.
    """
    if kind == "closed-form":
        exponents = -2.0 * np.arange(head_dim // 2, dtype=np.float64) / head_dim
        angles = np.asarray(positions, np.float64)[:, None] * np.power(float(theta), exponents)
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    cosf, sinf, powf = _libm()
    scale = np.float32(powf(np.float32(theta), np.float32(-2.0) / np.float32(head_dim)))
    angle = np.asarray(positions, np.float32)
    columns = []
    for _ in range(head_dim // 2):
        columns.append(angle)
        angle = (angle * scale).astype(np.float32)
    angles = np.stack(columns, axis=1)
    flat = angles.ravel().tolist()
    cos = np.fromiter(map(cosf, flat), np.float32, angles.size).reshape(angles.shape)
    sin = np.fromiter(map(sinf, flat), np.float32, angles.size).reshape(angles.shape)
    return cos.astype(dtype), sin.astype(dtype)


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
