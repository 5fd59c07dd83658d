"""float32 operations that are rounded exactly where they say, whatever XLA makes of their surroundings.

XLA's CPU backend fuses `a * b + c` into one rounding wherever it sees both, through optimization barriers and
detours over float64 alike (kernels.md section 6), and may drop a conversion to float32 and back. What it
cannot undo is integer arithmetic on the bits of a sum, so every operation here ends in that: the sum of two float64
values is rounded to odd (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 57(4),
2008), and rounding that to 24 bits gives the correctly rounded result.

"Wide" values are float64 that hold float32 values: chains of operations stay in it. XLA also flushes
subnormal float32 numbers to zero; wide values, where they are normal, and `narrow` keep them.

Each function opens its own scope of double precision.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SMALLEST_NORMAL = 2.0**-126
# Subnormal float32 numbers are multiples of this.
_SMALLEST = 2.0**-149
# Significant bits that float64 has and float32 has not.
_SURPLUS = 29


def wide(x: Any) -> Any:
    """`x` in float64."""
    with jax.enable_x64(True):
        return lax.convert_element_type(x, jnp.float64)


def narrow(x: Any) -> Any:
    """float64 rounded to float32, subnormals included."""
    with jax.enable_x64(True):
        magnitude = jnp.abs(x)
        steps = jnp.round(jnp.minimum(magnitude, _SMALLEST_NORMAL) * (1 / _SMALLEST))
        bits = lax.convert_element_type(steps, jnp.int32) | jnp.where(x < 0, jnp.int32(-(2**31)), jnp.int32(0))
        subnormal = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(magnitude < _SMALLEST_NORMAL, subnormal, lax.convert_element_type(x, jnp.float32))


def rounded(x: Any) -> Any:
    """float64 rounded to the 24 significant bits of float32, to nearest even; its range stays float64's."""
    with jax.enable_x64(True):
        bits = lax.bitcast_convert_type(x, jnp.int64)
        half = jnp.int64((1 << (_SURPLUS - 1)) - 1) + (lax.shift_right_logical(bits, jnp.int64(_SURPLUS)) & 1)
        return lax.bitcast_convert_type((bits + half) & jnp.int64(-(1 << _SURPLUS)), jnp.float64)


def rounded_with_subnormals(x: Any) -> Any:
    """`rounded`, and below 2^-126 to float32's subnormal numbers."""
    with jax.enable_x64(True):
        subnormal = jnp.round(x * (1 / _SMALLEST)) * _SMALLEST
        return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, rounded(x))


def odd_sum(a: Any, b: Any) -> Any:
    """`a + b` of float64 values, rounded to odd: float64."""
    with jax.enable_x64(True):
        total = a + b
        # Knuth's TwoSum: what the rounding of `total` left out.
        part = total - a
        error = (a - (total - part)) + (b - part)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        opposite = lax.shift_right_logical(lax.bitcast_convert_type(error, jnp.int64) ^ bits, jnp.int64(63))
        # A comparison with NaN is false: infinities and NaN stay as they are.
        inexact = lax.convert_element_type(jnp.abs(error) > 0, jnp.int64)
        return lax.bitcast_convert_type((bits - (inexact & opposite)) | inexact, jnp.float64)


def fused_wide(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of wide values, rounded once to 24 bits (a product of two float32 is exact in float64)."""
    with jax.enable_x64(True):
        return rounded(odd_sum(a * b, c))


def fused(a: Any, b: Any, c: Any) -> Any:
    """float32 `a * b + c`, rounded once."""
    with jax.enable_x64(True):
        return narrow(odd_sum(wide(a) * wide(b), wide(c)))


def added(a: Any, b: Any) -> Any:
    """float32 `a + b`, with neither operand's own product fused into it."""
    with jax.enable_x64(True):
        return narrow(odd_sum(wide(a), wide(b)))
