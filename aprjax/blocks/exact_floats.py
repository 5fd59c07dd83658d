"""Dots of plain floats that equal ggml's AVX2 build bit for bit, in JAX: for attention and for float weights.

The specification is float_twins.py, and default_twins.py for one register. The running sums of a dot (in `vec_dot` four
registers of eight lanes) are the leading axis here; one step adds a product to each of them, with one rounding
(fused.py). Sixteen lanes are what AVX-512 has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.fused import fused_multiply_add
from aprjax.blocks.halves import through_half

# Running sums held at a time: 2^22 float32 are 16 MiB.
_SUMS_TOGETHER = 1 << 22

# (running sums [registers, lanes, …], left, right of the remainder [tail, …]) -> dots […]
_Finish = Callable[[Any, Any, Any], Any]


def _add_neighbours(four: Any) -> Any:
    return (four[0] + four[1]) + (four[2] + four[3])


def _add_halves(lanes: Any) -> Any:
    """The upper half added to the lower one until one number is left: `[2^n, …]` -> `[…]`."""
    while lanes.shape[0] > 1:
        half = lanes.shape[0] // 2
        lanes = lanes[half:] + lanes[:half]
    return lanes[0]


def _add_registers(sums: Any) -> Any:
    """Registers 0+2 and 1+3, then both; of AVX2 lanes i+4, then neighbours; elsewhere by halves."""
    if sums.shape[0] == 1:
        return _add_halves(sums[0])
    pairs = sums[0:2] + sums[2:4]
    one = pairs[0] + pairs[1]
    return _add_neighbours(one[0:4] + one[4:8]) if one.shape[0] == 8 else _add_halves(one)


def _finish_f32(sums: Any, left: Any, right: Any) -> Any:
    """The registers' sum, then the remainder as gcc compiles it."""
    total = _add_registers(sums)
    width = left.shape[0]
    for index in range(width):
        if index < width // 4 * 4:
            # Two roundings: the product by itself, then the sum.
            product = fused_multiply_add(left[index], right[index], jnp.float32(0))
            total = fused_multiply_add(product, jnp.float32(1), total)
        else:
            total = fused_multiply_add(left[index], right[index], total)
    return total


def _with_remainder(total: Any, left: Any, right: Any) -> Any:
    """What 32 leaves over is added in float64 and rounded once; its products are exact in float32."""
    if not left.shape[0]:
        return total
    with jax.enable_x64(True):
        wide = lax.convert_element_type(total, jnp.float64)
        for index in range(left.shape[0]):
            one, other = (lax.convert_element_type(side[index], jnp.float64) for side in (left, right))
            wide = wide + one * other
        return lax.convert_element_type(wide, jnp.float32)


def _finish_f16(sums: Any, left: Any, right: Any) -> Any:
    """As for float32, but for the remainder."""
    return _with_remainder(_finish_f32(sums, left[:0], right[:0]), left, right)


def _finish_bf16(sums: Any, left: Any, right: Any) -> Any:
    """Registers (0+2) + (1+3); the lanes by halves."""
    eight = (sums[0] + sums[2]) + (sums[1] + sums[3])
    four = eight[4:8] + eight[0:4]
    two = four[0:2] + four[2:4]
    return _with_remainder(two[0] + two[1], left, right)


def _dots(left: Any, right: Any, finish: _Finish, registers: int, lanes: int) -> Any:
    """float32 `[..., m, n]` by `[..., k, n]`, equal numbers of axes -> `[..., m, k]`."""
    width, size = left.shape[-1], registers * lanes
    whole = width // size

    def steps(array: Any) -> Any:
        # [..., rows, n] -> [n / size, size, ..., rows]
        split = array[..., : whole * size].reshape(*array.shape[:-1], whole, size)
        return jnp.moveaxis(split, (-2, -1), (0, 1))

    def remainder(array: Any) -> Any:
        return jnp.moveaxis(array[..., whole * size :], -1, 0)

    def outer(one: Any, other: Any) -> tuple[Any, Any]:
        return one[..., :, None], other[..., None, :]

    def add(sums: Any, step: tuple[Any, Any]) -> tuple[Any, None]:
        return fused_multiply_add(*outer(*step), sums), None

    leading = jnp.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*leading, left.shape[-2], right.shape[-2])
    sums = lax.scan(add, jnp.zeros((size, *shape), jnp.float32), (steps(left), steps(right)))[0]
    return finish(sums.reshape(registers, lanes, *shape), *outer(remainder(left), remainder(right)))


def _dots_in_parts(left: Any, right: Any, finish: _Finish, registers: int, lanes: int) -> Any:
    """`_dots` over few rows of `left` at a time, so that the running sums stay small."""
    rows = left.shape[-2]
    leading = math.prod(jnp.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    per_row = max(1, registers * lanes * leading * right.shape[-2])
    together = max(1, min(rows, _SUMS_TOGETHER // per_row))
    parts = -(-rows // together)
    if parts == 1:
        return _dots(left, right, finish, registers, lanes)
    padding = [(0, 0)] * (left.ndim - 2) + [(0, parts * together - rows), (0, 0)]
    split = jnp.pad(left, padding).reshape(*left.shape[:-2], parts, together, left.shape[-1])
    done = lax.map(lambda part: _dots(part, right, finish, registers, lanes), jnp.moveaxis(split, -3, 0))
    joined = jnp.moveaxis(done, 0, -3)
    return joined.reshape(*joined.shape[:-3], parts * together, joined.shape[-1])[..., :rows, :]


def _prepare(left: Any, right: Any) -> tuple[Any, Any]:
    """Both as float32 with equal numbers of axes, so that the running sums' axis stays in front of all."""
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1]:
        raise ValueError(f"expected [..., m, n] and [..., k, n], found {list(left.shape)} and {list(right.shape)}")
    axes = max(left.ndim, right.ndim)
    left, right = (side.reshape(*(1,) * (axes - side.ndim), *side.shape) for side in (left, right))
    return left.astype(jnp.float32), right.astype(jnp.float32)


def _straight_through(
    round_operand: Callable[[Any], Any], finish: _Finish, registers: int, lanes: int
) -> Callable[[Any, Any], Any]:
    """The product of that kind, with the gradient of the plain product of its (rounded) operands."""

    def operands(left: Any, right: Any) -> tuple[Any, Any]:
        left, right = _prepare(left, right)
        return round_operand(left), round_operand(right)

    @jax.custom_vjp
    def product(left: Any, right: Any) -> Any:
        return _dots_in_parts(*operands(left, right), finish, registers, lanes)

    def forward(left: Any, right: Any) -> tuple[Any, tuple[Any, Any]]:
        return product(left, right), (left, right)

    def backward(kept: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
        def plain(left: Any, right: Any) -> Any:
            return jnp.einsum("...mn,...kn->...mk", *_prepare(left, right), precision=lax.Precision.HIGHEST)

        _, pull = jax.vjp(plain, *kept)
        return pull(cotangent)

    product.defvjp(forward, backward)
    return product


def _through_bfloat16(values: Any) -> Any:
    """Rounded to bfloat16 and back (`halves` says why not by conversion); it has float32's exponents."""
    return lax.reduce_precision(values, 8, 7)


_KINDS: dict[str, tuple[Callable[[Any], Any], _Finish]] = {
    "F32": (lambda values: values, _finish_f32),
    "F16": (through_half, _finish_f16),
    "BF16": (_through_bfloat16, _finish_bf16),
}


@cache
def _product(name: str, registers: int, lanes: int) -> Callable[[Any, Any], Any]:
    return _straight_through(*_KINDS[name], registers, lanes)


def exact_dot(name: str, left: Any, right: Any, registers: int = 4, lanes: int = 8) -> Any:
    """Every row of `left` with every row of `right` as ggml's `vec_dot` of plain type `name`, or tinyBLAS.

    F32 multiplies as it is; F16 and BF16 round both operands to that type first (weights and cached keys and
    values are so already; ggml rounds the activations, the queries and the probabilities).

    Args:
        name: `"F32"`, `"F16"` or `"BF16"`.
        left: float `[..., m, n]`.
        right: float `[..., k, n]`; leading axes broadcast.
        registers: of running sums: 4 as in `vec_dot`, or 1 as in tinyBLAS, where n is a multiple of the lanes.
        lanes: of a register: 8 with AVX2, 16 with AVX-512 (there n is a multiple of 64 in `vec_dot`: what it does with
            a remainder is not followed). BF16 is followed with AVX2 alone.

    Returns:
        float32 `[..., m, k]`. Straight-through gradients: those of the plain product.

    Raises:
        KeyError: another type.
        ValueError: the widths differ.
    """
    return _product(name, registers, lanes)(left, right)


def exact_dot_f32(left: Any, right: Any, registers: int = 4, lanes: int = 8) -> Any:
    """`exact_dot` of F32: attention with a float32 cache.

    `kq` is `exact_dot_f32(queries[heads, tokens, head_width], keys[heads, n_kv, head_width])`, `kqv` is
    `exact_dot_f32(probabilities[heads, tokens, n_kv], values[heads, head_width, n_kv])`. Further zeros behind an n
    that is a multiple of the registers' size change no bit.
    """
    return exact_dot("F32", left, right, registers, lanes)


def exact_dot_f16(left: Any, right: Any, registers: int = 4, lanes: int = 8) -> Any:
    """`exact_dot` of F16: attention with a float16 cache and flash attention off."""
    return exact_dot("F16", left, right, registers, lanes)
