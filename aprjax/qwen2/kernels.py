"""Which kernel computes a stage: one function per operation, dispatching on the `Arithmetic`'s choices.

Kernels that emulate an engine are straight-through: their gradient is that of the paper's equation
(`functional`) at the same inputs. Rounding has no useful derivative of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aprjax.blocks import block_format
from aprjax.blocks.activations import QUANTIZERS
from aprjax.blocks.dot import float_matmul, integer_matmul
from aprjax.blocks.exact import exact_matmul
from aprjax.blocks.exact_default import ProductKernel, product_kernel
from aprjax.blocks.exact_floats import exact_dot
from aprjax.blocks.halves import through_half
from aprjax.blocks.parts import Part
from aprjax.blocks.relay import Relaid
from aprjax.checkpoint.types import RopePairing
from aprjax.qwen2 import engine, flash, functional, realizar
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.native import native_products
from aprjax.qwen2.rounding import added, narrow, wide
from aprjax.qwen2.sharding import AXIS, SplitRelaid, split_product


def straight_through(kernel: Callable[..., Any], equation: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, with the gradient of `equation`, which takes the same arguments."""

    @jax.custom_vjp
    def run(*arguments: Any) -> Any:
        return kernel(*arguments)

    def forward(*arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        return kernel(*arguments), arguments

    def backward(arguments: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        return jax.vjp(equation, *arguments)[1](cotangent)

    run.defvjp(forward, backward)
    return run


def _library_exponential(x: Any) -> Any:
    """The library's exponential of wide `x`, as a wide value."""
    with jax.enable_x64(True):
        return wide(jnp.exp(x.astype(jnp.float32)))


def rms_norm(
    x: Float[Array, "position hidden"], weight: Float[Array, " hidden"], eps: Float[Array, ""], arithmetic: Arithmetic
) -> Float[Array, "position hidden"]:
    """RMSNorm as `Arithmetic.norm` has it."""
    if arithmetic.norm == "float" or not arithmetic.emulates:
        return functional.rms_norm(x, weight, eps)
    kernel = {
        "double-sum": partial(engine.rms_norm, exact=arithmetic.exact),
        "lanes": realizar.rms_norm_lanes,
        "sequential": realizar.rms_norm_sequential,
    }[arithmetic.norm]
    return straight_through(kernel, functional.rms_norm)(x, weight, eps)


def rotate(
    x: Float[Array, "position head channel"], cos: Array, sin: Array, pairing: RopePairing, arithmetic: Arithmetic
) -> Float[Array, "position head channel"]:
    """Rotary embedding as `Arithmetic.rotation` has it."""
    equation = partial(functional.rotate, pairing=pairing)
    if arithmetic.rotation == "compiled" or not arithmetic.emulates:
        return equation(x, cos, sin)
    kernel = partial(engine.rotate, pairing=pairing, rotation=arithmetic.rotation)
    return straight_through(kernel, equation)(x, cos, sin)


def attention_scores(q: Array, k: Array, arithmetic: Arithmetic) -> Float[Array, "head position key"]:
    """Scaled scores; in ggml's lanes if `Arithmetic.exact`."""
    if not (arithmetic.exact and arithmetic.emulates):
        return functional.attention_scores(q, k)
    # ggml's float32 queries are a transposed view, which tinyBLAS leaves to `vec_dot`; float16 ones are a copy.
    registers = _registers(q.shape[0], arithmetic) if arithmetic.kv_cache == "float16" else 4
    kernel = partial(engine.attention_scores, registers=registers, lanes=arithmetic.lanes)
    return straight_through(kernel, functional.attention_scores)(q, k)


def _registers(positions: int, arithmetic: Arithmetic) -> int:
    """Of running sums, in a product of plain floats."""
    kernel = product_kernel("F32", rows=0, tokens=positions, available=arithmetic.kernels)
    return kernel.registers


def masked_softmax(
    scores: Float[Array, "head position key"], visible: Bool[Array, "position key"], arithmetic: Arithmetic
) -> Float[Array, "head position key"]:
    """Softmax as `Arithmetic.softmax` and `Arithmetic.exponential` have it."""
    plain = arithmetic.softmax == "float" and arithmetic.exponential == "library"
    if plain or not arithmetic.emulates:
        return functional.masked_softmax(scores, visible)
    polynomial = arithmetic.exponential == "polynomial"
    if arithmetic.softmax == "double-sum" and not arithmetic.exact:
        kernel, exponential = engine.softmax_compiled, engine.exponential if polynomial else jnp.exp
    else:
        kernel = {
            "float": realizar.softmax_float,
            "double-sum": partial(engine.softmax, lanes=arithmetic.lanes),
            "sequential": realizar.softmax_sequential,
        }[arithmetic.softmax]
        bitwise = partial(engine.exponential_wide, vectors=arithmetic.vectors)
        exponential = bitwise if polynomial else _library_exponential
    return straight_through(partial(kernel, exponential=exponential), functional.masked_softmax)(scores, visible)


def weighted_values(probabilities: Array, v: Array, arithmetic: Arithmetic) -> Float[Array, "position width"]:
    """Probabilities times values; in ggml's lanes if `Arithmetic.exact`."""
    if not (arithmetic.exact and arithmetic.emulates):
        return functional.weighted_values(probabilities, v)
    kernel = partial(
        engine.weighted_values, registers=_registers(probabilities.shape[1], arithmetic), lanes=arithmetic.lanes
    )
    return straight_through(kernel, functional.weighted_values)(probabilities, v)


def flash_attention(
    q: Array, k: Array, v: Array, visible: Array, arithmetic: Arithmetic
) -> Float[Array, "position width"]:
    """Scores, softmax and weighted values in one, as ggml's kernel rounds them; heads merged."""

    def equation(q: Array, k: Array, v: Array, visible: Array) -> Array:
        probabilities = functional.masked_softmax(functional.attention_scores(q, k), visible)
        return functional.weighted_values(probabilities, v)

    if not arithmetic.exact and q.shape[0] >= flash.TILE:
        # Everything is float32 there, so that only the order of the sums is ggml's own.
        return equation(q, k, v, visible)
    return straight_through(partial(flash.flash_attention, vectors=arithmetic.vectors), equation)(q, k, v, visible)


def silu(x: Float[Array, "position width"], arithmetic: Arithmetic) -> Float[Array, "position width"]:
    """SiLU with the exponential of `Arithmetic.exponential`."""
    if arithmetic.exponential == "library" or not arithmetic.emulates:
        return functional.silu(x)
    kernel = partial(engine.silu, vectors=arithmetic.vectors) if arithmetic.exact else engine.silu_compiled
    return straight_through(kernel, functional.silu)(x)


def add(a: Array, b: Array, arithmetic: Arithmetic) -> Array:
    """`a + b`; if `Arithmetic.exact`, rounded apart from whatever made `a` and `b`."""
    if not (arithmetic.exact and arithmetic.emulates):
        return a + b
    return straight_through(added, jnp.add)(a, b)


def multiply(a: Array, b: Array, arithmetic: Arithmetic) -> Array:
    """`a * b`; if `Arithmetic.exact`, subnormal results are kept, as ggml keeps them."""
    if not (arithmetic.exact and arithmetic.emulates):
        return a * b

    def product(a: Array, b: Array) -> Array:
        with jax.enable_x64(True):
            return narrow(wide(a) * wide(b))

    return straight_through(product, jnp.multiply)(a, b)


def activation_block(name: str, columns: int, arithmetic: Arithmetic) -> str | int | None:
    """What activations are quantized to: one of ggml's blocks, realizar's of some size, or nothing."""
    engines = block_format(name).activation
    if arithmetic.matmul == "dequantize" or engines is None:
        return None
    if arithmetic.activations == "realizar":
        return realizar.ACTIVATION_BLOCKS.get(name)
    if arithmetic.activations == "per 32":
        return "Q8_1"
    if arithmetic.activations == "per 256":
        return "Q8_K" if columns % block_format("Q8_K").block_size == 0 else "Q8_0"
    return engines


def through_blocks(x: Float[Array, "position in"], partner: str | int, arithmetic: Arithmetic) -> Array:
    """`x` quantized and decoded again, in the arithmetic's type; straight through."""

    def kernel(x: Array) -> Array:
        if isinstance(partner, int):
            codes, scale = realizar.quantize(x.astype(jnp.float32), partner)
        else:
            quantized = QUANTIZERS[partner](x.astype(jnp.float32))
            codes, scale = quantized.codes, quantized.scale
        values = codes.astype(arithmetic.dtype) * scale.astype(arithmetic.dtype)[..., None]
        return values.reshape(x.shape)

    return straight_through(kernel, lambda x: x.astype(arithmetic.dtype))(x)


# Rows of a plain float matrix whose lanes are held at once.
_ROWS_TOGETHER = 64


def _exact_float_matmul(
    weight: Relaid, x: Float[Array, "position in"], kernel: ProductKernel
) -> Float[Array, "position out"]:
    """`ggml_vec_dot_f32` and `…_f16`, or tinyBLAS: for float16 the activations are rounded to it, too."""

    def product(weight: Relaid, x: Array) -> Array:
        left = through_half(x) if weight.name == "F16" else x
        rows = weight.codes[0].reshape(-1, weight.columns)[: weight.rows]
        rows = jnp.pad(rows, ((0, -weight.rows % _ROWS_TOGETHER), (0, 0)))
        pieces = rows.reshape(-1, _ROWS_TOGETHER, weight.columns)

        def multiply(piece: Array) -> Array:
            return exact_dot("F32", left, piece.astype(jnp.float32), kernel.registers, kernel.lanes)

        return jnp.moveaxis(jax.lax.map(multiply, pieces), 0, 1).reshape(x.shape[0], -1)[:, : weight.rows]

    # The weight is an argument: what is traced must not be closed over.
    return straight_through(product, partial(float_matmul, weight.name))(weight, x)


def matmul(
    weight: Relaid | SplitRelaid,
    x: Float[Array, "position in"],
    arithmetic: Arithmetic,
    *,
    part: Part | None = None,
    gathered: bool = True,
) -> Float[Array, "position out"]:
    """`x W^T` as the arithmetic has it. Float weight types have no integer dots in any engine.

    `part` says which rows of a matrix `weight` has, if not all: an engine chooses its kernel by all of them, and so
    does XLA. `gathered` is for a split weight (`split_product`).
    """
    if isinstance(weight, SplitRelaid):
        return split_product(
            weight,
            x,
            partial(_part, arithmetic=arithmetic, whole=weight.rows, devices=weight.mesh.size),
            gathered=gathered,
        )
    name = weight.name
    partner = activation_block(name, weight.columns, arithmetic)
    kernel = product_kernel(
        name,
        rows=part.rows if part else weight.rows,
        tokens=x.shape[0],
        available=arithmetic.kernels,
        lanes=arithmetic.lanes,
    )
    if partner is None:
        if arithmetic.exact and arithmetic.emulates and weight.name in ("F32", "F16") and weight.columns % 32 == 0:
            return _exact_float_matmul(weight, x, kernel)
        return float_matmul(name, weight, x, dtype=arithmetic.dtype, part=part)
    if arithmetic.activations == "engine" and arithmetic.matmul == "integer":
        if arithmetic.exact and arithmetic.emulates:
            return exact_matmul(name, weight, x, kernel)
        return integer_matmul(name, weight, x, native=native_products().target).astype(arithmetic.dtype)
    if arithmetic.activations == "realizar" and arithmetic.matmul == "integer" and arithmetic.emulates:
        return straight_through(realizar.integer_matmul, partial(float_matmul, name))(weight, x)
    return float_matmul(name, weight, through_blocks(x, partner, arithmetic), dtype=arithmetic.dtype, part=part)


def _part(weight: Relaid, x: Array, arithmetic: Arithmetic, whole: int, devices: int) -> Array:
    """One device's rows of a product with `whole` of them."""
    part = Part(jax.lax.axis_index(AXIS), whole, weight.columns, devices)
    return matmul(weight, x, arithmetic, part=part)
