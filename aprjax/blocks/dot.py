"""Matrix products with encoded weights: `integer_matmul` as ggml computes, `float_matmul` on decoded values.

Exactness of `integer_matmul`. An element contributes `code * group_scale * activation`, an integer. A float32
dot of integers is exact while every partial sum stays below 2^24, in whatever order it is summed; with
|activation| <= 127 the longest exact piece of a block is the largest power of two n with
n * max|code * group_scale| * 127 < 2^24:

    type   max|code * scale|   piece          type   max|code * scale|   piece
    Q4_0            8            32           Q2_K     3 * 15 =   45      256
    Q4_1           15            32           Q3_K     4 * 32 =  128      256
    Q5_0           16            32           Q4_K    15 * 63 =  945      128
    Q5_1           31            32           Q5_K    31 * 63 = 1953       64
    Q8_0          128            32           Q6_K   32 * 128 = 4096       32

Pieces of one block are added as int32. Where the products fit eight bits the dot runs on bfloat16 inputs (also
exact, twice as fast with AVX512-BF16 and made for GPUs); on an accelerator on float16 where they fit eleven (Q4_K);
otherwise on float32 at HIGHEST precision (no TF32). For many tokens, on accelerators for any, Q5_K and Q6_K, whose
pieces are short, instead split `code * scale` into 64 * high + low, both exact in bfloat16: |high| <= 64 and low <= 63
sum exactly over all 256. For one token `one_token` has integer sums.
Minimums are dotted with the activations' group sums in the same way. Only the outer scales and the sum over
blocks are float32 arithmetic, re-associated with respect to ggml (`roundings` has what keeps it small and the same).

All this is XLA's program. On processors with AVX-512 VNNI `native` has a kernel of its own, with the same bits.
Measured alternatives are in benchmarks/bench_dot.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aprjax.blocks.activations import QUANTIZERS
from aprjax.blocks.native.product import FORMATS as NATIVE_FORMATS
from aprjax.blocks.native.product import native_matmul
from aprjax.blocks.one_token import one_token_matmul, pays_for_one_token
from aprjax.blocks.parts import Part, dot_in_place
from aprjax.blocks.registry import block_format
from aprjax.blocks.relay import CODE_WIDTHS, Relaid, check_relayable, chunk_layout, join_planes, relay_traced
from aprjax.blocks.roundings import block_terms, blocks_of_a_run, unknown_zero
from aprjax.blocks.units import accelerated, fast_bfloat16, fast_float16

# Largest magnitude of a group scale: 4 unsigned bits (Q2_K), 6 signed (Q3_K), 6 unsigned, int8 (Q6_K).
_LARGEST_GROUP_SCALE = {"Q2_K": 15, "Q3_K": 32, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128}
_LARGEST_ACTIVATION = 127
# bfloat16 has 8 significant bits: all integers up to 2^8 are exact. float16 has 11.
_EXACT_IN_BFLOAT16 = 256
_EXACT_IN_FLOAT16 = 2048
# Splitting costs two passes over the weights, which many tokens share, and saves sums of many pieces. On an
# accelerator it also saves products of float32, which matrix units do not compute.
_LEAST_TOKENS_TO_SPLIT = 64
_LEAST_PIECES_TO_SPLIT = 4
_LOW_BITS = 6


def largest_product(name: str) -> int:
    """max|code * group_scale| of a format."""
    return CODE_WIDTHS[name].largest * _LARGEST_GROUP_SCALE.get(name, 1)


def exact_piece(name: str) -> int:
    """Elements of a block that one float32 dot sums exactly (see the module's docstring)."""
    piece = block_format(name).block_size
    while piece * largest_product(name) * _LARGEST_ACTIVATION >= 1 << 24:
        piece //= 2
    return piece


def _dot(left: Any, right: Any) -> Any:
    """`[tokens, k] @ [k, rows]` summed in the accumulator type of the inputs."""
    wide = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(
        left, right, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def _rows_chunkwise(packed: Any, name: str, tokens: int, dtype: Any, multiply: Any) -> Any:
    """Runs `multiply(chunk: Relaid, first_row) -> [tokens, chunk_rows]` over all rows; `[tokens, rows]`."""
    if isinstance(packed, Relaid):
        rows, chunks, chunk_rows = packed.rows, packed.chunks, packed.chunk_rows
        width = chunks * chunk_rows

        def take(index: Any) -> tuple[Any, Relaid]:
            return index * chunk_rows, packed.chunk(index)
    else:
        rows = packed.shape[0]
        chunks, chunk_rows = chunk_layout(rows, packed.shape[1] * block_format(name).block_size)
        width = rows

        def take(index: Any) -> tuple[Any, Relaid]:
            # The last chunk may overlap the one before: the same values are written twice.
            start = jnp.minimum(index * chunk_rows, rows - chunk_rows)
            return start, relay_traced(name, lax.dynamic_slice_in_dim(packed, start, chunk_rows))

    if chunks == 1:
        start, chunk = take(0)
        return multiply(chunk, start)[:, :rows]

    def body(index: Any, out: Any) -> Any:
        start, chunk = take(index)
        return lax.dynamic_update_slice_in_dim(out, multiply(chunk, start), start, axis=1)

    return lax.fori_loop(0, chunks, body, jnp.zeros((tokens, width), dtype))[:, :rows]


def _check(name: str, packed: Any, x: Any) -> int:
    """Checks name and widths; returns the input features."""
    blocks = check_relayable(name)
    if isinstance(packed, Relaid):
        if packed.name != name:
            raise ValueError(f"weights were re-laid as {packed.name}, asked to multiply as {name}")
        columns = packed.columns
    else:
        columns = packed.shape[1] * blocks.block_size
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"{name} weights take x[tokens, {columns}], found {list(x.shape)}")
    return columns


def _block_integers(chunk: Relaid, codes: Any, group_scales: Any, activations: Any) -> Any:
    """One block's exact integer dots: `[tokens, size]` by `[size, rows]` -> whole numbers `[tokens, rows]`.

    float32 below 2^24, int32 where they may be larger.
    """
    weights = join_planes(codes, CODE_WIDTHS[chunk.name])
    tokens, size = activations.shape
    piece = exact_piece(chunk.name)
    many = tokens >= _LEAST_TOKENS_TO_SPLIT or accelerated()
    if many and size // piece >= _LEAST_PIECES_TO_SPLIT and fast_bfloat16():
        return _split_integers(weights, group_scales, activations.astype(jnp.bfloat16))
    dtype = _exact_type(chunk.name)
    weights = weights.astype(dtype)
    if group_scales is not None:
        grouped = weights.reshape(group_scales.shape[0], -1, weights.shape[-1])
        weights = (grouped * group_scales.astype(dtype)[:, None]).reshape(weights.shape)
    activations = activations.astype(dtype)
    starts = range(0, weights.shape[0], piece)
    sums = [_dot(activations[:, start : start + piece], weights[start : start + piece]) for start in starts]
    if len(sums) == 1:
        return sums[0]
    total = jnp.zeros(sums[0].shape, jnp.int32)
    for part in sums:
        total = total + part.astype(jnp.int32)
    return total


def _exact_type(name: str) -> Any:
    """The fastest type of matrix products that holds every `code * group_scale` and every activation code."""
    if largest_product(name) <= _EXACT_IN_BFLOAT16:
        return jnp.bfloat16
    return jnp.float16 if largest_product(name) <= _EXACT_IN_FLOAT16 and fast_float16() else jnp.float32


def _split_integers(codes: Any, group_scales: Any, activations: Any) -> Any:
    """`_block_integers` by two bfloat16 dots, with what `code * scale` has above 64 and below."""
    grouped = codes.astype(jnp.int16).reshape(group_scales.shape[0], -1, codes.shape[-1])
    weights = (grouped * group_scales.astype(jnp.int16)[:, None]).reshape(codes.shape)
    high, low = weights >> _LOW_BITS, weights & ((1 << _LOW_BITS) - 1)
    above, below = (_dot(activations, part.astype(jnp.bfloat16)).astype(jnp.int32) for part in (high, low))
    return (above << _LOW_BITS) + below


def _integer_chunk(chunk: Relaid, quantized: Any, group_sums: Any) -> Any:
    """All blocks of one chunk of rows: float32 `[tokens, rows]`."""
    tokens = quantized.codes.shape[0]
    zero = unknown_zero(quantized.codes)

    def block(total: Any, step: Any) -> tuple[Any, None]:
        codes, scale, group_scales, minimum, group_minimums, activations, activation_scale, sums = step
        integers, lows = _block_integers(chunk, codes, group_scales, activations), None
        if group_minimums is not None:
            lows, sums = _dot(sums.astype(jnp.float32), group_minimums.astype(jnp.float32)), None
        sums = None if sums is None else sums[:, None]
        outer = activation_scale[:, None]
        for term in block_terms(outer, scale, integers, minimum=minimum, lows=lows, sums=sums, zero=zero):
            total = total + term
        return total, None

    def by_block(array: Any) -> Any:
        return None if array is None else jnp.swapaxes(array, 0, 1)

    steps = (
        chunk.codes,
        chunk.scale,
        chunk.group_scales,
        chunk.minimum,
        chunk.group_minimums,
        by_block(quantized.codes),
        by_block(quantized.scale),
        by_block(group_sums),
    )
    nothing = jnp.zeros((tokens, chunk.rows), jnp.float32)
    count = chunk.scale.shape[0]
    together = blocks_of_a_run(count)

    def run(total: Any, part: Any) -> tuple[Any, None]:
        return total + lax.scan(block, nothing, part)[0], None

    parts = jax.tree.map(lambda leaf: leaf.reshape(count // together, together, *leaf.shape[1:]), steps)
    total = lax.scan(run, nothing, parts)[0]
    # Of one block XLA leaves out the addition to zero with which its sum begins, and with it that 0 + -0 is 0.
    return jnp.where(total == 0, jnp.float32(0), total)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _integer_matmul(name: str, native: str | None, packed: Any, x: Any) -> Any:
    blocks = block_format(name)
    assert blocks.activation is not None
    quantized = QUANTIZERS[blocks.activation](x)
    if native is not None and name in NATIVE_FORMATS and isinstance(packed, Relaid) and not accelerated():
        return native_matmul(native, packed, quantized)
    sums = quantized.sums
    if blocks.activation == "Q8_K" and name in ("Q4_K", "Q5_K"):
        # Their minimums cover 32 elements, Q8_K's sums 16. At most 8 * 63 * 127 * 32 < 2^24 in the dot.
        sums = sums.astype(jnp.int32).reshape(*sums.shape[:-1], 8, 2).sum(axis=-1)
    elif name != "Q2_K" and blocks.activation != "Q8_1":
        sums = None
    if x.shape[0] == 1 and isinstance(packed, Relaid) and pays_for_one_token():
        return one_token_matmul(packed, quantized, sums)
    return _rows_chunkwise(
        packed, name, x.shape[0], jnp.float32, lambda chunk, _: _integer_chunk(chunk, quantized, sums)
    )


def _integer_forward(name: str, native: str | None, packed: Any, x: Any) -> tuple[Any, tuple[Any, Any]]:
    # A zero-size array carries the type of x.
    return _integer_matmul(name, native, packed, x), (packed, jnp.zeros((0,), x.dtype))


def no_cotangent(leaf: Any) -> Any:
    """The cotangent of a leaf that no gradient flows to: zeros, of `float0` for integers."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _integer_backward(name: str, native: str | None, kept: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
    del native
    packed, like = kept
    gradient = transposed_matmul(name, packed, cotangent).astype(like.dtype)
    return jax.tree.map(no_cotangent, packed), gradient


_integer_matmul.defvjp(_integer_forward, _integer_backward)


def integer_matmul(name: str, packed: Any, x: Any, *, native: str | None = None) -> Any:
    """`x @ W.T` as ggml's `vec_dot` computes it: activations quantized, integers summed exactly.

    Differentiable straight through: the gradient of `x` is that of a product with the decoded weights.

    Args:
        name: a quantized block type with an activation partner.
        packed: a `Relaid` (fast), or the file's blocks `uint8[rows, blocks, block_bytes]` (re-laid inside the
            traced function at every call: for tests and small matrices).
        x: float32 `[tokens, in]`.
        native: the name under which the kernel of `aprjax.blocks.native` is registered with XLA, which then computes
            the products of a `Relaid` on a processor, with the same bits.

    Returns:
        float32 `[tokens, rows]`. Integer parts are exact; the float32 sum over blocks differs from ggml's only in
        its order. On the 1.5B it is at most 1.2e-7 of a node's norm from the exact sum, where ggml's own lanes are up
        to 5.8e-7 (evidence/fast-preset-bound-*). Every rounding is where this module has it (`roundings`), so that a
        row's bits hang neither on the rows beside it nor on what the compiler fuses.

    Raises:
        ValueError: the format has no integer dot, or the widths differ.
    """
    _check(name, packed, x)
    if block_format(name).activation is None:
        raise ValueError(f"{name} has no activation partner in ggml; use float_matmul")
    return _integer_matmul(name, native, packed, x.astype(jnp.float32))


def decode_relaid(chunk: Relaid, dtype: Any = jnp.float32) -> Any:
    """One chunk's values `[in, rows]`: ggml's float32 values bit for bit (fields.py), widened to `dtype`."""
    if chunk.scale is None:
        return chunk.codes[0].astype(jnp.float32).astype(dtype).T

    def block(step: Any) -> Any:
        codes, scale, group_scales, minimum, group_minimums = step
        values = join_planes(codes, CODE_WIDTHS[chunk.name]).astype(jnp.float32)
        scale = scale.astype(jnp.float32)[None]
        scales = scale if group_scales is None else scale * group_scales.astype(jnp.float32)
        grouped = values.reshape(scales.shape[0], -1, chunk.rows) * scales[:, None]
        if minimum is not None:
            minimum = minimum.astype(jnp.float32)[None]
            lows = minimum if group_minimums is None else minimum * group_minimums.astype(jnp.float32)
            grouped = grouped - lows[:, None]
        return grouped.reshape(values.shape).astype(dtype)

    steps = (chunk.codes, chunk.scale, chunk.group_scales, chunk.minimum, chunk.group_minimums)
    return jax.vmap(block)(steps).reshape(-1, chunk.rows)


# Columns decoded at a time. The decoded piece of a feed-forward matrix (9 MB at 256) stays in the last-level
# cache: 4 ms instead of 16-26 for one token, and the shorter float32 sums halve the rounding error (5e-7 -> 2.5e-7).
_FLOAT_COLUMNS = 256


def _float_chunk(chunk: Relaid, x: Any, part: Part | None, at: Any) -> Any:
    """`x[tokens, in]` by one chunk of rows, from the row `at` of the part on, in the dtype of `x`."""
    dot = _dot if part is None else partial(dot_in_place, part=part, start=at, dot=_dot)
    if chunk.scale is None:
        return dot(x, decode_relaid(chunk, x.dtype))
    count, size = chunk.scale.shape[0], block_format(chunk.name).block_size
    together = max(1, _FLOAT_COLUMNS // size)
    while count % together:
        together -= 1

    def split(leaf: Any) -> Any:
        return leaf.reshape(count // together, together, *leaf.shape[1:])

    columns = jnp.swapaxes(x.reshape(x.shape[0], count // together, together * size), 0, 1)

    def step(total: Any, operands: tuple[Relaid, Any]) -> tuple[Any, None]:
        weights, piece = operands
        return total + dot(piece, decode_relaid(weights, x.dtype)), None

    start = jnp.zeros((x.shape[0], chunk.rows), x.dtype)
    return lax.scan(step, start, (jax.tree.map(split, chunk), columns))[0]


def float_matmul(name: str, packed: Any, x: Any, dtype: Any = jnp.float32, *, part: Part | None = None) -> Any:
    """`x @ W.T` with the decoded weights, at HIGHEST precision, decoded chunk by chunk.

    Args:
        name: block type, quantized or F32, F16, BF16.
        packed: a `Relaid` or `uint8[rows, blocks, block_bytes]`, as for `integer_matmul`.
        x: `[tokens, in]`.
        dtype: float32, or float64 under a scoped x64 mode: what `x` and the weights are widened to.
        part: which rows of a matrix these are, if not all: on a processor they then have the bits that they have among
            all of them (`parts`).

    Returns:
        `dtype[tokens, rows]`; the gradient of `x` flows.

    Raises:
        ValueError: the format has no computing layout, or the widths differ.
    """
    _check(name, packed, x)
    if x.shape[0] == 1 or accelerated():
        part = None  # one token's kernel has one sum for each row; an accelerator is to share the work
    return _float_matmul(name, jnp.dtype(dtype).name, packed, part, x.astype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _float_matmul(name: str, dtype: str, packed: Any, part: Part | None, x: Any) -> Any:
    return _rows_chunkwise(packed, name, x.shape[0], dtype, lambda chunk, at: _float_chunk(chunk, x, part, at))


# The product is linear in x, so that autodiff could do it; but it would keep every decoded chunk alive.
def _float_forward(name: str, dtype: str, packed: Any, part: Part | None, x: Any) -> tuple[Any, Any]:
    return _float_matmul(name, dtype, packed, part, x), (packed, part)


def _float_backward(name: str, dtype: str, kept: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any, Any]:
    del dtype
    packed, part = kept
    return *jax.tree.map(no_cotangent, (packed, part)), transposed_matmul(name, packed, cotangent)


_float_matmul.defvjp(_float_forward, _float_backward)


def transposed_matmul(name: str, packed: Any, y: Any) -> Any:
    """`y @ W` with the decoded weights: `[tokens, rows]` -> `[tokens, in]`, in the dtype of `y`."""
    blocks = check_relayable(name)
    if isinstance(packed, Relaid):
        columns, chunks, chunk_rows = packed.columns, packed.chunks, packed.chunk_rows
        y = jnp.pad(y, ((0, 0), (0, chunks * chunk_rows - packed.rows)))
    else:
        columns = packed.shape[1] * blocks.block_size
        chunks, chunk_rows = chunk_layout(packed.shape[0], columns)
        missing = chunks * chunk_rows - packed.shape[0]
        packed = jnp.pad(packed, ((0, missing), (0, 0), (0, 0)))
        y = jnp.pad(y, ((0, 0), (0, missing)))

    def body(index: Any, total: Any) -> Any:
        if isinstance(packed, Relaid):
            chunk = packed.chunk(index)
        else:
            chunk = relay_traced(name, lax.dynamic_slice_in_dim(packed, index * chunk_rows, chunk_rows))
        part = lax.dynamic_slice_in_dim(y, index * chunk_rows, chunk_rows, axis=1)
        return total + lax.dot_general(
            part, decode_relaid(chunk, y.dtype), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )

    return lax.fori_loop(0, chunks, body, jnp.zeros((y.shape[0], columns), y.dtype))
