"""The registry of block formats: what a type is called, how large it is, how it decodes and encodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from aprjax.blocks import apr_types, blocks_of_32, encoders, exotic, floats, k_quants
from aprjax.blocks.fields import Fields, combine

Decoder = Callable[[Any], Any]
Encoder = Callable[[np.ndarray], np.ndarray]


class UnknownBlockType(KeyError):
    """No block format has this name or ggml id."""

    def __init__(self, asked: object) -> None:
        super().__init__(asked)
        self.asked = asked

    def __str__(self) -> str:
        known = ", ".join(FORMATS)
        return f"unknown block type {self.asked!r}; known are {known}"


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Attributes:
        name: as ggml spells it (`"Q4_K"`), or `"AprQ4"`, `"AprQ8"`.
        ggml_id: ggml's type number; None for APR's own types.
        block_size: elements per block (1 for plain types).
        block_bytes: bytes per block.
        decode: NumPy, `uint8[n, block_bytes] -> float32[n, block_size]`; any leading axes will do for our
            own formats. Bit-exact against ggml's `dequantize_row_*`.
        decode_jax: the same for JAX, jit-able, bit-equal; None where only gguf-py can decode.
        encode: NumPy, `float32[n, block_size] -> uint8[n, block_bytes]`; None where there is no encoder.
        activation: block type that ggml's `vec_dot` quantizes activations to (`"Q8_0"`, `"Q8_1"`, `"Q8_K"`);
            None for plain types, whose dot is a float dot.
        unpack: integer fields of blocks (NumPy or JAX); None for types without any.
        flat: blocks run over the whole tensor and need not begin with a row.
        tensor_scale: a float32 scale of the whole tensor precedes the blocks; `decode` leaves it out
            and `dequantize` multiplies by it.
    """

    name: str
    ggml_id: int | None
    block_size: int
    block_bytes: int
    decode: Decoder
    decode_jax: Decoder | None = None
    encode: Encoder | None = None
    activation: str | None = None
    unpack: Callable[[Any], Fields] | None = None
    flat: bool = False
    tensor_scale: bool = False

    @property
    def header_bytes(self) -> int:
        """Bytes before the first block of a tensor."""
        return 4 if self.tensor_scale else 0

    @property
    def quantized(self) -> bool:
        """Whether elements share scales (False for F32, F16, I8 and the like)."""
        return self.block_size > 1 or self.tensor_scale


def _quantized(  # noqa: PLR0917 - a row of the table below
    name: str,
    ggml_id: int | None,
    size: int,
    nbytes: int,
    unpack: Callable[[Any], Fields],
    activation: str | None,
    **extra: Any,
) -> BlockFormat:
    def decode(blocks: Any) -> Any:
        return combine(unpack(blocks))

    return BlockFormat(name, ggml_id, size, nbytes, decode, decode, activation=activation, unpack=unpack, **extra)


def _plain(name: str, ggml_id: int, dtype: type, encode: Encoder | None = None) -> BlockFormat:
    decode = floats.decoder(dtype)
    return BlockFormat(name, ggml_id, 1, np.dtype(dtype).itemsize, decode, decode, encode)


# name, ggml id, elements, bytes, activation partner: ggml.h `enum ggml_type`, ggml-common.h, ggml-cpu.c.
_EXOTIC = (
    ("IQ2_XXS", 16, 256, 66, "Q8_K"),
    ("IQ2_XS", 17, 256, 74, "Q8_K"),
    ("IQ3_XXS", 18, 256, 98, "Q8_K"),
    ("IQ1_S", 19, 256, 50, "Q8_K"),
    ("IQ4_NL", 20, 32, 18, "Q8_0"),
    ("IQ3_S", 21, 256, 110, "Q8_K"),
    ("IQ2_S", 22, 256, 82, "Q8_K"),
    ("IQ4_XS", 23, 256, 136, "Q8_K"),
    ("IQ1_M", 29, 256, 56, "Q8_K"),
    ("TQ1_0", 34, 256, 54, "Q8_K"),
    ("TQ2_0", 35, 256, 66, "Q8_K"),
    ("MXFP4", 39, 32, 17, "Q8_0"),
    ("NVFP4", 40, 64, 36, "Q8_0"),
)


def _formats() -> tuple[BlockFormat, ...]:
    from aprjax.blocks import activations

    small, large = blocks_of_32, k_quants
    return (
        _plain("F32", 0, np.float32, floats.encode_f32),
        _plain("F16", 1, np.float16, floats.encode_f16),
        _quantized("Q4_0", 2, 32, 18, small.unpack_q4_0, "Q8_0", encode=encoders.encode_q4_0),
        _quantized("Q4_1", 3, 32, 20, small.unpack_q4_1, "Q8_1", encode=encoders.encode_q4_1),
        _quantized("Q5_0", 6, 32, 22, small.unpack_q5_0, "Q8_0", encode=encoders.encode_q5_0),
        _quantized("Q5_1", 7, 32, 24, small.unpack_q5_1, "Q8_1", encode=encoders.encode_q5_1),
        _quantized("Q8_0", 8, 32, 34, small.unpack_q8_0, "Q8_0", encode=encoders.encode_q8_0),
        _quantized("Q8_1", 9, 32, 36, activations.unpack_q8_1, None),
        _quantized("Q2_K", 10, 256, 84, large.unpack_q2_k, "Q8_K"),
        _quantized("Q3_K", 11, 256, 110, large.unpack_q3_k, "Q8_K"),
        _quantized("Q4_K", 12, 256, 144, large.unpack_q4_k, "Q8_K", encode=encoders.encode_q4_k),
        _quantized("Q5_K", 13, 256, 176, large.unpack_q5_k, "Q8_K"),
        _quantized("Q6_K", 14, 256, 210, large.unpack_q6_k, "Q8_K", encode=encoders.encode_q6_k),
        _quantized("Q8_K", 15, 256, 292, activations.unpack_q8_k, None),
        *(
            BlockFormat(name, ggml_id, size, nbytes, exotic.decoder(name), activation=activation)
            for name, ggml_id, size, nbytes, activation in _EXOTIC
        ),
        _plain("I8", 24, np.int8),
        _plain("I16", 25, np.int16),
        _plain("I32", 26, np.int32),
        _plain("I64", 27, np.int64),
        _plain("F64", 28, np.float64),
        BlockFormat("BF16", 30, 1, 2, floats.decode_bf16, floats.decode_bf16, floats.encode_bf16),
        _quantized("AprQ4", None, 32, 18, apr_types.unpack_apr_q4, None, flat=True, encode=apr_types.encode_apr_q4),
        BlockFormat(
            "AprQ8", None, 1, 1, apr_types.decode_apr_q8, apr_types.decode_apr_q8, flat=True, tensor_scale=True
        ),
    )


FORMATS: Mapping[str, BlockFormat] = MappingProxyType({blocks.name: blocks for blocks in _formats()})
_BY_ID = {blocks.ggml_id: blocks for blocks in FORMATS.values() if blocks.ggml_id is not None}


def block_format(name: str | int) -> BlockFormat:
    """The format of that name, or of that ggml type number.

    Raises:
        UnknownBlockType: there is none; the message lists the known names.
    """
    found = FORMATS.get(name) if isinstance(name, str) else _BY_ID.get(name)
    if found is None:
        raise UnknownBlockType(name)
    return found


def block_count(blocks: BlockFormat, shape: tuple[int, ...], *, row_padded: bool = False) -> int:
    """How many blocks a tensor takes; exact integers however large the shape claims to be."""
    if row_padded and shape:
        return math.prod(shape[:-1]) * -(-shape[-1] // blocks.block_size)
    return -(-math.prod(shape) // blocks.block_size)


def byte_size(name: str | int, shape: tuple[int, ...], *, row_padded: bool = False) -> int:
    """Bytes that a tensor takes in a file.

    Args:
        name: block type.
        shape: row-major shape; `()` is one element. Python integers: a lying header cannot overflow them.
        row_padded: each row (last axis) is padded to whole blocks; otherwise blocks run over the whole tensor
            and only the last one may be partial.
    """
    blocks = block_format(name)
    shape = tuple(int(extent) for extent in shape)
    return blocks.header_bytes + block_count(blocks, shape, row_padded=row_padded) * blocks.block_bytes
