"""NumPy twins of ggml's dots of plain floats, and the fused multiply-add that all twins stand on.

ggml's functions are `ggml_vec_dot_f32`, `ggml_vec_dot_f16` and `ggml_vec_dot_bf16` (ggml-cpu/vec.cpp), AVX2 branches:
four registers of eight lanes run over 32 elements a step. What is left after the last 32 is added element by element.
"""

from __future__ import annotations

import numpy as np

from aprjax.blocks.floats import decode_bf16, encode_bf16

STEP = 32


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
    """`a * b + c` of float32 rounded once: subnormal numbers, infinities and NaN as IEEE 754 has them.

    Args:
        a: float32, any shape.
        b: likewise, broadcasting.
        c: likewise.

    Returns:
        float32. The product is exact in float64 (24 + 24 bits). The sum is rounded *to odd* there: if it is not
        exact, the neighbour of the exact value whose last bit is 1 is taken. From that, rounding to float32 gives the
        same as rounding the exact value, because 53 >= 24 + 2 (Boldo and Melquiond, IEEE Trans. Comp. 57(4), 2008).
    """
    a, b, c = (np.asarray(value, np.float64) for value in (a, b, c))
    with np.errstate(over="ignore", invalid="ignore"):
        product = a * b
        total = np.asarray(product + c)
        # Knuth's two-sum: total + error is the exact sum. An infinite total has a NaN for an error: no correction.
        back = total - product
        error = (product - (total - back)) + (c - back)
        even = (total.view(np.int64) & 1) == 0
        neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        odd = np.where(even & (np.abs(error) > 0), neighbour, total)
        return odd.astype(np.float32)


def _running_sums(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The four registers after the last whole step: float32 `[…, 4, 8]`."""
    steps = left.shape[-1] // STEP
    sums = np.zeros((*np.broadcast_shapes(left.shape[:-1], right.shape[:-1]), STEP), np.float32)
    for step in range(steps):
        part = slice(STEP * step, STEP * (step + 1))
        sums = fused_multiply_add(left[..., part], right[..., part], sums)
    return sums.reshape(*sums.shape[:-1], 4, 8)


def _add_registers(sums: np.ndarray) -> np.ndarray:
    """`GGML_F32_VEC_REDUCE`: registers 0+2 and 1+3, then both; lanes i+4, then neighbours. `[…, 4, 8]` -> `[…]`."""
    pairs = sums[..., 0:2, :] + sums[..., 2:4, :]
    eight = pairs[..., 0, :] + pairs[..., 1, :]
    four = eight[..., 0:4] + eight[..., 4:8]
    return (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])


def _check(left: np.ndarray, right: np.ndarray) -> None:
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(f"widths differ: {left.shape[-1]} and {right.shape[-1]}")


def vec_dot_f32(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 dots `[…, n]` by `[…, n]` -> `[…]` as `ggml_vec_dot_f32`.

    The remainder of n by 32 is a loop in the source, `sum += x * y`. As gcc compiles it, whole fours are multiplied
    as vectors, so that their products are rounded before they are added one by one; the last one to three are fused.
    """
    _check(left, right)
    total = _add_registers(_running_sums(left, right))
    width = left.shape[-1]
    for index in range(width // STEP * STEP, width):
        if index < width // 4 * 4:
            total = total + left[..., index] * right[..., index]
        else:
            total = fused_multiply_add(left[..., index], right[..., index], total)
    return total


def vec_dot_f16(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float16 dots `[…, n]` by `[…, n]` -> float32 `[…]` as `ggml_vec_dot_f16`: float32 sums, the remainder in float64.

    Both operands are rounded to float16 if they are not yet: ggml does so with the activations.
    """
    _check(left, right)
    left, right = (side.astype(np.float16).astype(np.float32) for side in (left, right))
    return _with_remainder(_add_registers(_running_sums(left, right)), left, right)


def vec_dot_bf16(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bfloat16 dots of float32 `[…, n]` by `[…, n]` -> float32 `[…]` as `ggml_vec_dot_bf16`.

    Both operands are rounded to bfloat16. The registers are added as (0+2) + (1+3), the lanes by halves.
    """
    _check(left, right)
    left, right = (_through_bf16(side) for side in (left, right))
    sums = _running_sums(left, right)
    eight = (sums[..., 0, :] + sums[..., 2, :]) + (sums[..., 1, :] + sums[..., 3, :])
    four = eight[..., 4:8] + eight[..., 0:4]
    two = four[..., 0:2] + four[..., 2:4]
    return _with_remainder(two[..., 0] + two[..., 1], left, right)


def _with_remainder(total: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Adds what 32 leaves over, in float64 and rounded once; the products are exact in float32."""
    wide = total.astype(np.float64)
    for index in range(left.shape[-1] // STEP * STEP, left.shape[-1]):
        wide = wide + left[..., index] * right[..., index]
    return wide.astype(np.float32)


def _through_bf16(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    return decode_bf16(encode_bf16(values.reshape(-1, 1))).reshape(values.shape)
