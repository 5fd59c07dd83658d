"""Whole tensors: `dequantize` and `encode`, in chunks that stay in the cache."""

from __future__ import annotations

import math

import numpy as np

from aprjax.blocks import apr_types
from aprjax.blocks.registry import BlockFormat, block_format, byte_size

# Elements decoded at a time. 64 Ki elements are 256 KiB of float32: with the codes and the bytes they fit a
# core's second-level cache (1 MiB on the EPYC measured; benchmarks/bench_decode.py).
CHUNK_ELEMENTS = 1 << 16


def _decode_into(blocks: BlockFormat, data: np.ndarray, out: np.ndarray) -> None:
    """Decodes `uint8[n, block_bytes]` into `float32[n, block_size]`, chunk by chunk."""
    step = max(1, CHUNK_ELEMENTS // blocks.block_size)
    for start in range(0, len(data), step):
        out[start : start + step] = blocks.decode(data[start : start + step])


def dequantize(name: str | int, data: np.ndarray, shape: tuple[int, ...], *, row_padded: bool = False) -> np.ndarray:
    """Decodes a tensor.

    Args:
        name: block type.
        data: `uint8[bytes]`, exactly `byte_size(name, shape)` of them.
        shape: row-major shape of the values.
        row_padded: each row was padded to whole blocks.

    Returns:
        float32 `[*shape]`; bit-exact against ggml. At most a few MB are held beside input and output.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    blocks = block_format(name)
    shape = tuple(int(extent) for extent in shape)
    data = np.asarray(data).reshape(-1).view(np.uint8)
    expected = byte_size(name, shape, row_padded=row_padded)
    if data.size != expected:
        raise ValueError(f"{blocks.name} of shape {list(shape)} takes {expected} bytes, found {data.size}")
    body = data[blocks.header_bytes :].reshape(-1, blocks.block_bytes)
    count = math.prod(shape)
    padded = np.empty((len(body), blocks.block_size), np.float32)
    _decode_into(blocks, body, padded)
    if blocks.tensor_scale:
        padded *= data[:4].view("<f4")[0]
    if row_padded and shape and shape[-1] % blocks.block_size:
        rows = padded.reshape(math.prod(shape[:-1]), -(-shape[-1] // blocks.block_size) * blocks.block_size)
        return np.ascontiguousarray(rows[:, : shape[-1]]).reshape(shape)
    return padded.reshape(-1)[:count].reshape(shape)


def encode(name: str | int, values: np.ndarray) -> np.ndarray:
    """Encodes a tensor: float32 `[*shape]` -> `uint8[byte_size(name, shape)]`.

    A last partial block is filled up with zeros.

    Raises:
        ValueError: the format has no encoder, or values are not finite and the format shares scales (one
            infinity would spoil its whole block).
    """
    blocks = block_format(name)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if blocks.quantized and not np.isfinite(flat).all():
        index = int(np.flatnonzero(~np.isfinite(flat))[0])
        raise ValueError(f"{blocks.name} cannot hold {flat[index]} (element {index} in row-major order)")
    if blocks.tensor_scale:
        scale = apr_types.apr_q8_scale(flat)
        head = np.array([scale], "<f4").view(np.uint8)
        return np.concatenate([head, apr_types.encode_apr_q8(flat, scale)])
    if blocks.encode is None:
        raise ValueError(f"{blocks.name} has no encoder")
    missing = -flat.size % blocks.block_size
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, np.float32)])
    body = flat.reshape(-1, blocks.block_size)
    out = np.empty((len(body), blocks.block_bytes), np.uint8)
    step = max(1, CHUNK_ELEMENTS // blocks.block_size)
    for start in range(0, len(body), step):
        out[start : start + step] = blocks.encode(body[start : start + step])
    return out.reshape(-1)
