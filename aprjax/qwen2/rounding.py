"""float32 operations that are rounded exactly where they say, whatever XLA makes of their surroundings.

XLA's CPU backend fuses `a * b + c` into one rounding wherever it sees both, through optimization barriers and
detours over float64 alike (kernels.md section 6). What it cannot undo is integer arithmetic on the bits of a
sum, so every operation here ends in that: the sum of two float64 values is rounded to odd (S. Boldo,
G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 57(4), 2008), and rounding that to float32
gives the correctly rounded result.

Each function opens its own scope of double precision; nothing leaves it but float32 (or where it says so).
XLA also flushes subnormals to zero; `narrow` keeps them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SMALLEST_NORMAL = 2.0**-126
# Subnormals are multiples of this.
_SMALLEST = 2.0**-149


def wide(x: Any) -> Any:
    """`x` in float64; for use inside a scope of double precision."""
    return lax.convert_element_type(x, jnp.float64)


def narrow(x: Any) -> Any:
    """float64 rounded to float32, subnormals included."""
    with jax.enable_x64(True):
        magnitude = jnp.abs(x)
        steps = jnp.round(jnp.minimum(magnitude, _SMALLEST_NORMAL) / _SMALLEST)
        bits = lax.convert_element_type(steps, jnp.int32) | jnp.where(x < 0, jnp.int32(-(2**31)), jnp.int32(0))
        subnormal = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(magnitude < _SMALLEST_NORMAL, subnormal, lax.convert_element_type(x, jnp.float32))


def rounded(x: Any) -> Any:
    """float64 rounded to float32 values, subnormals included, but kept in float64, where they are normal."""
    with jax.enable_x64(True):
        subnormal = jnp.round(x / _SMALLEST) * _SMALLEST
        return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, wide(narrow(x)))


def odd_sum(a: Any, b: Any) -> Any:
    """`a + b` of float64 values, rounded to odd: float64."""
    with jax.enable_x64(True):
        total = a + b
        # Knuth's TwoSum: what the rounding of `total` left out.
        part = total - a
        error = (a - (total - part)) + (b - part)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        outward = (error > 0) == (total > 0)
        # A comparison with NaN is false: infinities and NaN stay as they are.
        correct = (jnp.abs(error) > 0) & (bits & jnp.int64(1) == 0)
        step = jnp.where(outward, jnp.int64(1), jnp.int64(-1))
        return lax.bitcast_convert_type(jnp.where(correct, bits + step, bits), jnp.float64)


def fused_wide(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of float32 values, rounded to odd: float64 (their product is exact in it)."""
    with jax.enable_x64(True):
        return odd_sum(wide(a) * wide(b), wide(c))


def fused(a: Any, b: Any, c: Any) -> Any:
    """float32 `a * b + c`, rounded once."""
    return narrow(fused_wide(a, b, c))


def added(a: Any, b: Any) -> Any:
    """float32 `a + b`, with neither operand's own product fused into it."""
    with jax.enable_x64(True):
        return narrow(odd_sum(wide(a), wide(b)))
