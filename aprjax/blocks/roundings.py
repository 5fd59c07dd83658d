"""Sums over blocks whose float32 bits hang on no compiler, and lose little.

XLA's CPU backend lets LLVM contract `a * b + c` into one rounding where the processor has FMA and both operations
land in one loop. Which of them do hangs on everything around them and on the release: of the same two sums jaxlib 0.10
contracts both, jaxlib 0.12 one. Barriers do not stop it (kernels.md section 6). Two things make it harmless: an integer
operation on a product's bits, which no multiply-add could take in; and products that are exact, so that it is the same
to round them or not.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

# No activation code has it: quantizers keep to -127 … 127. A compiler cannot know that.
_NEVER = -128
# A float16 has 11 significant bits: its product with 13 more is exact in float32.
_LOW_BITS = 13
LARGEST_INTEGER = 1 << 2 * _LOW_BITS
# Blocks are summed in runs of at most this many, then the runs: over the 280 blocks of a width of
# 8960 that leaves 1.0e-7 of the output's rms as rounding error; one running sum leaves 3e-7, and ggml's own
# eight lanes 3.1e-7.
_BLOCKS_TOGETHER = 16


def blocks_of_a_run(count: int) -> int:
    """How many of `count` blocks are summed before the sums of the runs are."""
    return next(size for size in range(min(count, _BLOCKS_TOGETHER), 0, -1) if count % size == 0)


def unknown_zero(codes: Any) -> Any:
    """A scalar int32 that is zero, and that no compiler can replace by zero: of int8 activation codes."""
    return (codes[(0,) * codes.ndim] == _NEVER).astype(jnp.int32)


def rounded_product(a: Any, b: Any, zero: Any) -> Any:
    """float32 `a * b`, rounded before anything is added to it; `zero` is an `unknown_zero`."""
    bits = lax.bitcast_convert_type(a * b, jnp.int32)
    return lax.bitcast_convert_type(bits | zero, jnp.float32)


def difference_of_products(scale: Any, integers: Any, minimum: Any, lows: Any) -> Any:
    """`scale * integers - minimum * lows`, what a block with minimums comes to.

    The two terms are large against their difference, because codes with a minimum are never negative: rounded one by
    one they would make most of a short sum's error. So the integers are cut in two, all of whose products are exact,
    and only differences are rounded.

    Args:
        scale: float16 numbers, as float32.
        integers: int32, or float32 of whole numbers; in magnitude up to `LARGEST_INTEGER`.
        minimum: as `scale`.
        lows: as `integers`.

    Returns:
        float32: the differences of the upper and of the lower halves and their sum, each rounded once, whatever is
        contracted.
    """

    def halves(whole: Any) -> tuple[Any, Any]:
        whole = whole.astype(jnp.int32)
        high, low = whole >> _LOW_BITS, whole & ((1 << _LOW_BITS) - 1)
        return high.astype(jnp.float32), low.astype(jnp.float32)

    (above, below), (lows_above, lows_below) = halves(integers), halves(lows)
    high = scale * above - minimum * lows_above
    return high * jnp.float32(1 << _LOW_BITS) + (scale * below - minimum * lows_below)


def block_terms(
    activation_scale: Any, scale: Any, integers: Any, *, minimum: Any, lows: Any, sums: Any, zero: Any
) -> tuple[Any, ...]:
    """What a block adds to its row's sum: float32 numbers, to be added one after the other.

    Args:
        activation_scale: of the activations' block.
        scale: of the weights' block, float16.
        integers: the exact dot of codes, group scales and activations.
        minimum: of the weights' block, float16, or None.
        lows: the exact dot of group minimums and the activations' sums, or None.
        sums: where there is a minimum without groups: Q8_1's scaled sum.
        zero: an `unknown_zero`.
    """
    scale = scale.astype(jnp.float32)
    if lows is not None:
        value = difference_of_products(scale, integers, minimum.astype(jnp.float32), lows)
        return (rounded_product(activation_scale, value, zero),)
    product = rounded_product(activation_scale * scale, integers.astype(jnp.float32), zero)
    if minimum is None:
        return (product,)
    return product, -rounded_product(sums, minimum.astype(jnp.float32), zero)
