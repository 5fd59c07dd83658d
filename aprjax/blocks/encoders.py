"""Encoders for the blocks of 32, Q4_K and Q6_K, byte for byte ggml's `quantize_row_*_ref`.

They run ggml's arithmetic in ggml's order: float32, no FMA (ggml-base is compiled without), and every sum over
the elements of a group strictly from first to last. Groups are independent, so arrays are laid out
`[element, group]` and the loops run over the 16 or 32 elements while NumPy works on all groups at once.

Input must be finite (`aprjax.blocks.encode` checks).
"""

from __future__ import annotations

import numpy as np

_F = np.float32
# ggml-quants.c GROUP_MAX_EPS: a group whose largest magnitude is below this counts as zero.
_GROUP_EPSILON = _F(1e-15)


def round_half_away(values: np.ndarray) -> np.ndarray:
    """C's `roundf`, Rust's `f32::round`: ties away from zero."""
    magnitude = np.abs(values)
    floor = np.floor(magnitude)
    # `floor(x + 0.5)` would round 0.49999997 up; the difference x - floor(x) is exact.
    return np.copysign(floor + (magnitude - floor >= _F(0.5)), values)


def _nearest(values: np.ndarray) -> np.ndarray:
    """Nearest integer as ggml finds it, int32: adding 1.5 * 2^23 leaves it, half to even, in the low 23 bits.

    Beyond +-2^22 the bits wrap around; ggml's do as well.
    """
    return ((values + _F(12582912.0)).view(np.int32) & 0x007FFFFF) - 0x00400000


def _running_sum(terms: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Sum over the first axis, one term after the other from 0 (NumPy's own sum may go pairwise)."""
    total = np.zeros(terms.shape[1:], np.float32) if start is None else start.copy()
    for term in terms:
        total += term
    return total


def encode_q8_0(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 34]`. Multiplies by 1/d and rounds ties away, unlike the activations."""
    largest = np.abs(values).max(axis=1)
    scale = largest / _F(127)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scale == 0, _F(0), _F(1) / scale)
        product = values * inverse[:, None]
        head = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    # 1/d overflows for d below 2.9e-39; x86 turns the infinities into 0.
    codes = round_half_away(np.where(np.isfinite(product), product, _F(0))).astype(np.int8)
    return np.concatenate([head, codes.view(np.uint8)], axis=1)


def encode_q4_0(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 18]`: the element of largest magnitude gets code 0."""
    scale, codes = _codes_around(values, 8)
    return np.concatenate([_half(scale), _pairs(codes)], axis=1)


def encode_q5_0(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 22]`: likewise, with a fifth bit of each code apart."""
    scale, codes = _codes_around(values, 16)
    return np.concatenate([_half(scale), _fifth_bits(codes), _pairs(codes)], axis=1)


def encode_q4_1(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 20]`: steps from the least element to the greatest."""
    scale, least, codes = _codes_from_least(values, 15)
    return np.concatenate([_half(scale), _half(least), _pairs(codes)], axis=1)


def encode_q5_1(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 32]` -> `uint8[n, 24]`: likewise, with a fifth bit of each code apart."""
    scale, least, codes = _codes_from_least(values, 31)
    return np.concatenate([_half(scale), _half(least), _fifth_bits(codes), _pairs(codes)], axis=1)


def _codes_around(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and codes about zero; ggml casts to int8, which cuts off, after adding half a step."""
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)[:, 0]
    # ggml searches from +0, so a block of zeros has that sign.
    scale = np.where(extreme == 0, _F(0), extreme) / _F(-half)
    codes = values * _inverse(scale)[:, None] + _F(half + 0.5)
    return scale, np.minimum(codes.astype(np.int32), 2 * half - 1).astype(np.uint8)


def _codes_from_least(values: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, least elements and codes."""
    # The first of equals: zeros have two signs.
    least, greatest = (
        np.take_along_axis(values, place[:, None], axis=1)[:, 0]
        for place in (values.argmin(axis=1), values.argmax(axis=1))
    )
    with np.errstate(over="ignore"):
        scale = (greatest - least) / _F(steps)
        codes = (values - least[:, None]) * _inverse(scale)[:, None] + _F(0.5)
    return scale, least, np.minimum(codes.astype(np.int32), steps).astype(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scale == 0, _F(0), _F(1) / scale)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """The low four bits of elements i and i + 16 in one byte."""
    return (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """Bit i of 32 is the fifth of element i."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _search_scale_and_minimum(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The search of ggml's `make_qkx2_quants` for Q4_K: codes 0..15, 21 candidates, squared error.

    Args:
        x: float32 `[32, groups]`.
        weights: float32 `[32, groups]`, importance of each element.

    Returns:
        scale `[groups]`, minus the minimum `[groups]`, codes int32 `[32, groups]`.
    """
    sum_w = _running_sum(weights[1:], weights[0])
    sum_x = _running_sum(weights[1:] * x[1:], weights[0] * x[0])
    low = np.minimum(x.min(axis=0), _F(0))
    high = x.max(axis=0)
    flat = high == low

    def quantize(inverse: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        return np.clip(_nearest(inverse * (x - minimum)), 0, 15)

    def spread(minimum: np.ndarray) -> np.ndarray:
        return np.where(flat, _F(1), high - minimum)

    def error_of(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        difference = scale * codes + minimum - x
        return _running_sum(weights * (difference * difference))

    inverse = _F(15) / spread(low)
    scale, minimum = _F(1) / inverse, low
    codes = quantize(inverse, minimum)
    best = error_of(codes.astype(np.float32), scale, minimum)
    for step in range(21):
        # Each better minimum moves the range of the candidates that follow.
        trial = quantize((_F(-1.0) + _F(0.1) * _F(step) + _F(15)) / spread(minimum), minimum)
        levels = trial.astype(np.float32)
        weighted = weights * levels
        sum_l = _running_sum(weighted)
        sum_l2 = _running_sum(weighted * levels)
        sum_xl = _running_sum(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        solvable = determinant > 0
        divisor = np.where(solvable, determinant, _F(1))
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        positive = new_minimum > 0
        new_scale = np.where(positive, sum_xl / np.where(sum_l2 == 0, _F(1), sum_l2), new_scale)
        new_minimum = np.where(positive, _F(0), new_minimum)
        error = error_of(levels, new_scale, new_minimum)
        better = solvable & (error < best)
        best = np.where(better, error, best)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
        codes = np.where(better, trial, codes)
    return np.where(flat, _F(0), scale), -np.where(flat, low, minimum), np.where(flat, 0, codes)


def encode_q4_k(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 256]` -> `uint8[n, 144]` (`quantize_row_q4_K_ref`)."""
    count = len(values)
    x = np.ascontiguousarray(values.reshape(-1, 32).T)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        typical = np.sqrt(_running_sum(x * x) / _F(32))
        scale, minimum, codes = _search_scale_and_minimum(x, typical + np.abs(x))
        scales, minimums = scale.reshape(count, 8), minimum.reshape(count, 8)
        six_bit_scales, d = _six_bits(scales)
        six_bit_minimums, dmin = _six_bits(minimums)
        # Codes are made once more, against the scales as they will be decoded.
        final = (d.astype(np.float32)[:, None] * six_bit_scales.astype(np.float32)).reshape(-1)
        offset = (dmin.astype(np.float32)[:, None] * six_bit_minimums.astype(np.float32)).reshape(-1)
        again = np.clip(_nearest((x + offset) / np.where(final == 0, _F(1), final)), 0, 15)
    codes = np.where(final == 0, codes, again).astype(np.uint8)
    pairs = codes.T.reshape(count, 4, 2, 32)
    out = np.empty((count, 144), np.uint8)
    out[:, 0:2] = d.view(np.uint8).reshape(count, 2)
    out[:, 2:4] = dmin.view(np.uint8).reshape(count, 2)
    low, high = six_bit_scales[:, :4], six_bit_scales[:, 4:]
    low_minimum, high_minimum = six_bit_minimums[:, :4], six_bit_minimums[:, 4:]
    out[:, 4:8] = low | ((high >> 4) << 6)
    out[:, 8:12] = low_minimum | ((high_minimum >> 4) << 6)
    out[:, 12:16] = (high & 15) | ((high_minimum & 15) << 4)
    out[:, 16:144] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(count, 128)
    return out


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group values `[n, 8]` as uint8 0..63 and their float16 unit, largest/63 `[n]`."""
    largest = np.maximum(values.max(axis=1), _F(0))
    inverse = np.where(largest > 0, _F(63) / np.where(largest > 0, largest, _F(1)), _F(0))
    # ggml stores the integer in a byte before it takes the minimum: a negative one wraps.
    codes = _nearest(inverse[:, None] * values).astype(np.uint8)
    return np.minimum(codes, 63), (largest / _F(63)).astype("<f2")


def _search_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The search of ggml's `make_qx_quants` for Q6_K: codes -32..31, weights x squared, 18 more candidate scales.

    Args:
        x: float32 `[16, groups]`.

    Returns:
        scale `[groups]` (either sign), codes int32 `[16, groups]` plus 32 (0 for a zero group).
    """
    magnitude = np.abs(x)
    first = magnitude.argmax(axis=0)
    extreme = np.take_along_axis(x, first[None], axis=0)[0]
    empty = magnitude.max(axis=0) < _GROUP_EPSILON
    extreme = np.where(empty, _F(1), extreme)
    weights = x * x
    weighted = weights * x

    def quantize(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.clip(_nearest(inverse * x), -32, 31)
        levels = codes.astype(np.float32)
        return codes, _running_sum(weighted * levels), _running_sum(weights * levels * levels)

    codes, sum_lx, sum_l2 = quantize(_F(-32) / extreme)
    scale = np.where(sum_l2 != 0, sum_lx / np.where(sum_l2 == 0, _F(1), sum_l2), _F(0))
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        trial, sum_lx, sum_l2 = quantize(-(_F(32) + _F(0.1) * _F(step)) / extreme)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        new_scale = sum_lx / np.where(sum_l2 > 0, sum_l2, _F(1))
        scale = np.where(better, new_scale, scale)
        best = np.where(better, new_scale * sum_lx, best)
        codes = np.where(better, trial, codes)
    return np.where(empty, _F(0), scale), np.where(empty, 0, codes + 32)


def encode_q6_k(values: np.ndarray) -> np.ndarray:
    """float32 `[n, 256]` -> `uint8[n, 210]` (`quantize_row_q6_K_ref`)."""
    count = len(values)
    x = np.ascontiguousarray(values.reshape(-1, 16).T)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale, codes = _search_scale(x)
        scales = scale.reshape(count, 16)
        # Above 1e9 the sums of cubes overflow and scales become NaN, which C's `>` passes over.
        magnitude = np.where(np.isnan(scales), _F(0), np.abs(scales))
        extreme = np.take_along_axis(scales, magnitude.argmax(axis=1)[:, None], axis=1)[:, 0]
        empty = magnitude.max(axis=1) < _GROUP_EPSILON
        inverse = _F(-128) / np.where(empty, _F(1), extreme)
        d = (_F(1) / inverse).astype("<f2")
        eight_bit_scales = np.minimum(_nearest(inverse[:, None] * scales), 127).astype(np.int8)
        final = (d.astype(np.float32)[:, None] * eight_bit_scales.astype(np.float32)).reshape(-1)
        again = np.clip(_nearest(x / np.where(final == 0, _F(1), final)), -32, 31) + 32
    codes = np.where(final == 0, codes, again).astype(np.uint8)
    quarters = codes.T.reshape(count, 2, 4, 32)
    out = np.empty((count, 210), np.uint8)
    out[:, 0:128] = ((quarters[:, :, 0:2] & 15) | ((quarters[:, :, 2:4] & 15) << 4)).reshape(count, 128)
    upper = quarters >> 4
    packed = upper[:, :, 0] | (upper[:, :, 1] << 2) | (upper[:, :, 2] << 4) | (upper[:, :, 3] << 6)
    out[:, 128:192] = packed.reshape(count, 64)
    out[:, 192:208] = eight_bit_scales.view(np.uint8)
    out[:, 208:210] = d.view(np.uint8).reshape(count, 2)
    out[empty] = 0
    return out
