"""The integer fields of a block, unpacked the same way for NumPy and for JAX.

Every format decoded here has the shape

    value = scale * group_scales * code  -  minimum * group_minimums

with `scale` and `minimum` one float16 per block and the rest small integers. Decoding, the integer
dot and the tests all start from these fields, so that a byte map is written down once.

Why the order of float operations does not matter (and why XLA's fusing `a*b - c` into one FMA,
kernels.md section 6, cannot change a bit): each *product* is exact in float32. A float16 has 11
significant bits and its smallest step is 2^-24; with s the bits of `group_scales * code`,

    Q4_0 11+3  Q4_1 11+4  Q5_0 11+4  Q5_1 11+5  Q8_0 11+7  Q2_K 11+6  Q3_K 11+7  Q4_K 11+10  Q5_K 11+11
    Q6_K 11+12 (|scale * code| <= 128*32; apart from the powers of two it is at most 127*31 < 2^12)

are all at most 24, products are multiples of 2^-24 and at most 65504*4096 < 2^128: no rounding, no
underflow, no overflow. `minimum * group_minimums` has at most 11+6 bits. Only the one subtraction
rounds, and an FMA rounds it once as well. Infinite or NaN scales give NaN or infinity by the same
IEEE rules either way; only the payload of a NaN is unspecified.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


class Fields(NamedTuple):
    """What a batch of blocks holds. Arrays are NumPy or JAX, as the blocks were.

    Attributes:
        codes: int8 `[..., groups, group_size]`, with the format's offset already subtracted.
        scale: float32 `[...]`.
        group_scales: int8 or uint8 `[..., groups]`, or None where groups == 1.
        minimum: float32 `[...]`, subtracted; None for the symmetric formats.
        group_minimums: uint8 `[..., groups]`, or None where groups == 1.
    """

    codes: Any
    scale: Any
    group_scales: Any = None
    minimum: Any = None
    group_minimums: Any = None


def namespace(array: Any) -> ModuleType:
    """`numpy` for a NumPy array, `jax.numpy` for anything else (traced values included)."""
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy as jnp

    return jnp


def reinterpret(data: Any, dtype: Any) -> Any:
    """The bytes of an array, `uint8[..., n * itemsize]` say, as little-endian `dtype[..., n]`."""
    dtype = np.dtype(dtype)
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).view(dtype.newbyteorder("<"))
    import jax

    if dtype.itemsize == data.dtype.itemsize:
        return jax.lax.bitcast_convert_type(data, dtype)
    return jax.lax.bitcast_convert_type(
        data.reshape(*data.shape[:-1], data.shape[-1] // dtype.itemsize, dtype.itemsize), dtype
    )


def half(data: Any) -> Any:
    """One little-endian float16, `uint8[..., 2]`, as float32 `[...]` (exact)."""
    return reinterpret(data, np.float16)[..., 0].astype(np.float32)


def bits(data: Any, shifts: list[int], mask: int) -> Any:
    """Bit fields of bytes `[..., n]` as `[..., len(shifts), n]`: one copy per shift, masked."""
    shift = np.array(shifts, np.uint8)[:, None]
    return (data[..., None, :] >> shift) & np.uint8(mask)


def combine(fields: Fields) -> Any:
    """The values of unpacked blocks: float32 `[..., groups * group_size]`."""
    scale = fields.scale[..., None]
    if fields.group_scales is not None:
        scale = scale * fields.group_scales.astype(np.float32)
    offset = None
    if fields.minimum is not None:
        offset = fields.minimum[..., None]
        if fields.group_minimums is not None:
            offset = offset * fields.group_minimums.astype(np.float32)
    values = fields.codes.astype(np.float32)
    if isinstance(values, np.ndarray):
        # In place: a temporary of the size of the output would leave the cache.
        values *= scale[..., None]
        if offset is not None:
            values -= offset[..., None]
    else:
        values = values * scale[..., None]
        if offset is not None:
            values = values - offset[..., None]
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
