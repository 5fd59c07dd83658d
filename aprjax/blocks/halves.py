"""Rounding to float16 and back that no compiler leaves out.

A conversion to a narrower type and back is excess precision that XLA may keep (`xla_allow_excess_precision`, on by
default): its GPU backend drops both conversions (openxla/xla#41605), its CPU backend some. Here they are steps of an
engine's arithmetic. `reduce_precision` is never dropped, but knows no subnormal numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_EXPONENT_BITS, _MANTISSA_BITS = 5, 10
# Below the smallest normal number, float16 numbers are multiples of the smallest.
_SMALLEST_NORMAL = 2.0**-14
_SMALLEST = 2.0**-24


@jax.custom_jvp
def through_half(x: Any) -> Any:
    """float32 or float64 `x`, rounded to float16's nearest number: to even, to infinity from 65520.

    Its derivative is one.
    """
    normal = lax.reduce_precision(x, _EXPONENT_BITS, _MANTISSA_BITS)
    subnormal = jnp.round(x * (1 / _SMALLEST)) * _SMALLEST
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, normal)


through_half.defjvps(lambda tangent, _, x: tangent)
