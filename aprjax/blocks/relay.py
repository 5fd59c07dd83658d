"""Weights laid out for computing: `relay(name, packed)` -> `Relaid`, still encoded, done once at load.

ggml lays each row's blocks one after the other, and each format scatters its bits in its own way, which XLA
decodes by gathering. Laid with the rows of the matrix as the fastest axis and the codes as bit planes, every
step of decoding is an elementwise operation on long vectors (benchmarks/bench_dot.py compares the layouts).
The size stays that of the file (Q4_K + 3 %).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aprjax.blocks.fields import Fields
from aprjax.blocks.registry import BlockFormat, block_format

# Rows are computed on in chunks of at most this many elements: 64 MiB decoded to float32.
CHUNK_ELEMENTS = 1 << 24
# A chunk's sums stay in a second-level cache: 2 MiB for 256 tokens, and every block of a row reads and writes them.
CHUNK_ROWS = 2048


@dataclass(frozen=True)
class CodeWidth:
    """How a format's codes are stored: bits per code and what is subtracted from the unsigned code."""

    bits: int
    offset: int = 0

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, lowest bits first; each divides 8, so that no code straddles a byte."""
        return {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: ()}[self.bits]

    @property
    def largest(self) -> int:
        """Largest magnitude of a code."""
        return max(self.offset, (1 << self.bits) - 1 - self.offset) if self.bits < 8 else 128


CODE_WIDTHS = {
    "Q4_0": CodeWidth(4, 8),
    "Q4_1": CodeWidth(4),
    "Q5_0": CodeWidth(5, 16),
    "Q5_1": CodeWidth(5),
    "Q8_0": CodeWidth(8),
    "Q2_K": CodeWidth(2),
    "Q3_K": CodeWidth(3, 4),
    "Q4_K": CodeWidth(4),
    "Q5_K": CodeWidth(5),
    "Q6_K": CodeWidth(6, 32),
    "AprQ4": CodeWidth(4, 8),
}


_PLAIN = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "group_scales", "minimum", "group_minimums"],
    meta_fields=["name", "rows"],
)
@dataclass(frozen=True)
class Relaid:
    """A weight matrix, encoded, rows fastest. A pytree; `name` and `rows` are static.

    Axes: chunk c, block b, element or group within the block, row r within the chunk. Rows beyond `rows` are
    zero padding of the last chunk.

    Attributes:
        name: block type.
        rows: output features.
        codes: bit planes, each `uint8[c, b, size * bits / 8, r]`: the bits at `bits * s` of byte j belong
            to element `s * (size * bits / 8) + j`. For 8-bit codes one `int8[c, b, size, r]`; for
            plain types one array `[c, r, in]` of the type itself (nothing to decode, nothing to gain).
        scale: float16 `[c, b, r]`; None for plain types.
        group_scales: int8 `[c, b, groups, r]` or None.
        minimum: float16 `[c, b, r]` or None.
        group_minimums: uint8 `[c, b, groups, r]` or None.
    """

    name: str
    rows: int
    codes: tuple[Any, ...]
    scale: Any = None
    group_scales: Any = None
    minimum: Any = None
    group_minimums: Any = None

    @property
    def plain(self) -> bool:
        """Whether the weights are F32, F16 or BF16."""
        return self.name in _PLAIN

    @property
    def chunks(self) -> int:
        """Number of row chunks."""
        return self.codes[0].shape[0]

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk."""
        return self.codes[0].shape[-2 if self.plain else -1]

    @property
    def columns(self) -> int:
        """Input features."""
        if self.plain:
            return self.codes[0].shape[-1]
        return self.codes[0].shape[1] * block_format(self.name).block_size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def chunk(self, index: Any) -> Relaid:
        """One chunk (a traced index will do), chunk axis dropped; `rows` then is `chunk_rows`."""
        taken = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)
        return replace(taken, rows=self.chunk_rows)


def chunk_layout(rows: int, columns: int) -> tuple[int, int]:
    """Number of chunks and rows per chunk: at most `CHUNK_ELEMENTS` and `CHUNK_ROWS`, equal if a divisor is near."""
    least = max(1, -(-rows * columns // CHUNK_ELEMENTS), -(-rows // CHUNK_ROWS))
    for chunks in range(least, 2 * least):
        if rows % chunks == 0:
            return chunks, rows // chunks
    return least, -(-rows // least)


def _planes(codes: Any, width: CodeWidth) -> tuple[Any, ...]:
    """int8 `[n, b, size]` -> bit planes `uint8[n, b, size * bits / 8]`."""
    if not width.planes:
        return (codes,)
    unsigned = (codes + np.int8(width.offset)).astype(np.uint8)
    planes = []
    done = 0
    for bits in width.planes:
        pieces = unsigned.reshape(*unsigned.shape[:-1], 8 // bits, -1)
        plane = None
        for position in range(8 // bits):
            part = ((pieces[..., position, :] >> np.uint8(done)) & np.uint8((1 << bits) - 1)) << np.uint8(
                position * bits
            )
            plane = part if plane is None else plane | part
        planes.append(plane)
        done += bits
    return tuple(planes)


def join_planes(planes: tuple[Any, ...], width: CodeWidth) -> Any:
    """Bit planes `uint8[size * bits / 8, r]` -> signed codes int8 `[size, r]`. Traced."""
    if not width.planes:
        return planes[0]
    codes = None
    done = 0
    for plane, bits in zip(planes, width.planes, strict=True):
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        part = (plane[None] >> shifts[:, None, None]) & jnp.uint8((1 << bits) - 1)
        part = part.reshape(-1, plane.shape[-1]) << jnp.uint8(done)
        codes = part if codes is None else codes | part
        done += bits
    assert codes is not None
    return codes.astype(jnp.int8) - jnp.int8(width.offset)


def codes_by_axes(planes: tuple[Any, ...], width: CodeWidth, size: int) -> Any:
    """Bit planes `uint8[c, b, size * bits / 8, r]` -> signed codes int8 `[c, b, *axes, r]`. Traced.

    The product of `axes` is `size`, in the order of elements; each plane is constant along some of them, and a shift
    is a number of the others. So no index is divided, as it would be along one axis of all elements.
    """
    if not width.planes:
        return planes[0]
    chunks, blocks, _, rows = planes[0].shape
    # Places of a byte in the coarsest plane; places in the finest for each of them; bytes of the finest.
    coarse, fine = 8 // max(width.planes), 8 // min(width.planes)
    axes = (coarse, fine // coarse, size // fine)
    codes = None
    done = 0
    for plane, bits in zip(planes, width.planes, strict=True):
        if 8 // bits == fine:
            places, held = (coarse, fine // coarse, 1), (1, 1, axes[2])
        else:
            places, held = (coarse, 1, 1), (1, *axes[1:])
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape(*places, 1)
        part = (plane.reshape(chunks, blocks, *held, rows) >> shifts) & jnp.uint8((1 << bits) - 1)
        part = part << jnp.uint8(done)
        codes = part if codes is None else codes | part
        done += bits
    assert codes is not None
    return codes.astype(jnp.int8) - jnp.int8(width.offset)


def _pieces(blocks: BlockFormat, packed: Any) -> tuple[Any, ...]:
    """What `Relaid` keeps of some rows, rows still first: `uint8[n, b, bytes]` -> arrays `[n, b, …]`."""
    assert blocks.unpack is not None
    fields: Fields = blocks.unpack(packed)
    codes = fields.codes.reshape(*fields.codes.shape[:-2], -1)
    minimum = None if fields.minimum is None else fields.minimum.astype(np.float16)
    group_scales = None if fields.group_scales is None else fields.group_scales.astype(np.int8)
    # float16 -> float32 -> float16 returns the bits that were stored.
    scale = fields.scale.astype(np.float16)
    return (_planes(codes, CODE_WIDTHS[blocks.name]), scale, group_scales, minimum, fields.group_minimums)


def check_relayable(name: str) -> BlockFormat:
    """The format, if `relay` knows it.

    Raises:
        ValueError: it does not; such tensors are decoded at load (`dequantize`) and held as F32.
    """
    blocks = block_format(name)
    if name not in CODE_WIDTHS and name not in _PLAIN:
        raise ValueError(f"{name} has no computing layout; decode it with `dequantize` and relay it as F32")
    return blocks


def relay(name: str, packed: Any) -> Relaid:
    """Lays a matrix out for `integer_matmul` and `float_matmul`.

    Compiled once per shape.

    Args:
        name: block type.
        packed: `uint8[rows, blocks, block_bytes]`, NumPy (a memory map will do) or JAX.

    Returns:
        A `Relaid` of JAX arrays.

    Raises:
        ValueError: the format has no computing layout (IQ*, AprQ8, integers), or the blocks are not of its size.
    """
    blocks = check_relayable(name)
    if packed.ndim != 3 or packed.shape[2] != blocks.block_bytes:
        raise ValueError(f"{name} takes uint8[rows, blocks, {blocks.block_bytes}], found {list(packed.shape)}")
    rows = packed.shape[0]
    chunks, chunk_rows = chunk_layout(rows, packed.shape[1] * blocks.block_size)
    if name in _PLAIN and isinstance(packed, np.ndarray):
        # A view costs nothing here; under XLA the same bitcast runs at 70 million elements a second.
        plain = np.ascontiguousarray(packed).reshape(rows, -1).view(_PLAIN[name])
        padded = np.pad(plain, ((0, chunks * chunk_rows - rows), (0, 0)))
        return Relaid(name, rows, (jnp.asarray(padded.reshape(chunks, chunk_rows, -1)),))
    done = []
    for chunk in range(chunks):
        part = packed[chunk * chunk_rows : (chunk + 1) * chunk_rows]
        if part.shape[0] < chunk_rows:
            part = np.pad(part, ((0, chunk_rows - part.shape[0]), (0, 0), (0, 0)))
        done.append(_relay_chunk(name, part))
    if chunks == 1:
        stacked = jax.tree.map(lambda leaf: leaf[None], done[0])
    else:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
    return replace(stacked, rows=rows)


def relay_traced(name: str, packed: Any) -> Relaid:
    """One chunk of `packed` inside a traced function, chunk axis already dropped."""
    blocks = check_relayable(name)
    if name in _PLAIN:
        values = packed
        if packed.dtype == jnp.uint8:
            bytewise = packed.reshape(packed.shape[0], -1, blocks.block_bytes)
            values = jax.lax.bitcast_convert_type(bytewise, _PLAIN[name])
        return Relaid(name, packed.shape[0], (values.reshape(packed.shape[0], -1),))
    pieces = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), _pieces(blocks, packed))
    return Relaid(name, packed.shape[0], *pieces)


_relay_chunk = jax.jit(relay_traced, static_argnums=0)
