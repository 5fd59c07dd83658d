"""One correctly rounded multiply-add in JAX, whatever the compiler makes of it.

ggml's CPU kernels accumulate with float32 FMA instructions: `a * b + c` rounded once. XLA has no such
operation. Its CPU backend happens to contract `a * b + c` where the processor has FMA, which depends on the
processor, on how operations were grouped into loops and on flags, so that nothing here relies on it.

Instead the sum is taken in float64 and rounded to float32 through *round to odd* (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums", IEEE Trans. Comp. 57(4), 2008):

1. `a * b` has at most 48 significant bits: exact in float64, so that fusing it into a later sum changes nothing.
2. `a * b + c` is rounded to float64 with its error by Knuth's two-sum, which has no multiplication to contract.
3. The rounded sum is moved to the value towards zero, and its last bit set, if the error is not zero. A second rounding
   to 24 bits then gives what one rounding of the exact sum gives, because 53 >= 24 + 2.
4. That rounding, to nearest even, is done on the bits. The conversion to float32 is then exact, so that it makes no
   difference if XLA drops a conversion to float32 and back.

XLA's CPU threads flush subnormal float32 numbers to zero, ggml's do not: operands and results below 2^-126 in
magnitude come out as zero. Quantized activations get there only if a whole block stays below 1e-29.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Bits of float64's significand that float32's lacks: 53 - 24.
_DROPPED = 29


@jax.custom_jvp
def fused_multiply_add(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of float32 arrays, rounded once; infinities and NaN as IEEE 754 has them.

    Traced under a scoped x64 mode: the caller's mode neither matters nor changes. Its derivative is that of
    `a * b + c`.
    """
    with jax.enable_x64(True):
        a, b, c = (lax.convert_element_type(value, jnp.float64) for value in (a, b, c))
        product = a * b
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)
        # An infinite sum has a NaN for an error, which compares as false.
        inexact = (jnp.abs(error) > 0).astype(jnp.int64)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        opposite = lax.shift_right_logical(lax.bitcast_convert_type(error, jnp.int64) ^ bits, jnp.int64(63))
        odd = (bits - (inexact & opposite)) | inexact
        to_even = jnp.int64((1 << _DROPPED - 1) - 1) + ((odd >> _DROPPED) & 1)
        rounded = (odd + to_even) & jnp.int64(-1 << _DROPPED)
        return lax.convert_element_type(lax.bitcast_convert_type(rounded, jnp.float64), jnp.float32)


@fused_multiply_add.defjvp
def _derivative(primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    # Autodiff would find nothing: bits have no derivative.
    a, b, _ = primals
    change_a, change_b, change_c = tangents
    return fused_multiply_add(*primals), change_a * b + a * change_b + change_c
