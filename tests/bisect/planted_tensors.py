"""Accidents of a tensor, planted by plain NumPy and byte code that shares nothing with the search for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from blocks.support import random_blocks

from aprjax.blocks import FORMATS, encode
from aprjax.checkpoint.types import Checkpoint, EncodedTensor, ModelConfig

HEAD = 64
Plant = Callable[[EncodedTensor, np.random.Generator], EncodedTensor]
CONFIG = ModelConfig("qwen2", 256, 1, 4, 2, HEAD, 512, 300, 512, 1e6, "neox", 1e-6)
Q = "model.layers.0.self_attn.q_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741 - q, k, v and o are what they are called
GATE = "model.layers.0.mlp.gate_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
SHAPES = {Q: (256, 256), O: (256, 256), GATE: (256, 512), UP: (256, 512), EMBEDDING: (300, 256)}
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
PLAIN = ("F32", "F16", "BF16")
ENCODED = ("F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K")
EVERY = (*PACKED, *PLAIN, "IQ4_NL", "MXFP4")


def tensor(name: str, kind: str, rng: np.random.Generator, shape: tuple[int, ...] | None = None) -> EncodedTensor:
    """A tensor of a block type: random blocks, or encoded gaussian values for the plain types."""
    shape = shape or SHAPES[name]
    if kind in PACKED:
        count = int(np.prod(shape)) // FORMATS[kind].block_size
        data = random_blocks(kind, (count,), rng).reshape(-1)
    elif kind in PLAIN:
        data = encode(kind, rng.normal(0, 0.05, shape).astype(np.float32))
    else:
        blocks = FORMATS[kind]
        packed = rng.integers(0, 256, (int(np.prod(shape)) // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
        if kind == "MXFP4":
            packed[:, 0] = rng.integers(118, 122, len(packed))
        else:
            packed[:, :2] = rng.uniform(0.001, 0.02, (len(packed), 1)).astype("<f2").view(np.uint8)
        data = packed.reshape(-1)
    return EncodedTensor(name, shape, kind, data, stored_name=name)


def stored(like: EncodedTensor, values: np.ndarray, kind: str = "F32") -> EncodedTensor:
    """Values under the name of a tensor, in another block type."""
    values = np.ascontiguousarray(values, np.float32)
    return EncodedTensor(like.name, values.shape, kind, encode(kind, values), stored_name=like.name)


def checkpoint(*tensors: EncodedTensor) -> Checkpoint:
    """A checkpoint of these tensors alone."""
    return Checkpoint(Path("planted.gguf"), "gguf", CONFIG, {t.name: t for t in tensors}, None, None, {})


def by_rows(
    change: Callable[[np.ndarray], np.ndarray],
) -> Plant:
    """An accident that moves or changes whole rows of bytes."""

    def plant(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
        del rng
        rows = old.data.reshape(old.shape[0], -1)
        return replace(old, data=np.ascontiguousarray(change(rows.copy())).reshape(-1))

    return plant


def by_values(
    change: Callable[[np.ndarray], np.ndarray],
) -> Plant:
    """An accident of the decoded values, stored as F32."""
    return lambda old, rng: stored(old, change(old.decode()))


def interleaved(rows: np.ndarray) -> np.ndarray:
    """llama.cpp's permutation of Llama's q and k (convert_hf_to_gguf.py: reshape, swapaxes)."""
    heads = len(rows) // HEAD
    return rows.reshape(heads, 2, HEAD // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def taken_apart(rows: np.ndarray) -> np.ndarray:
    """The inverse of `interleaved`."""
    heads = len(rows) // HEAD
    return rows.reshape(heads, HEAD // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def in_order(order: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Heads in another order."""
    return lambda rows: rows.reshape(len(order), -1, *rows.shape[1:])[order].reshape(rows.shape)


def some(change: Callable[[np.ndarray], np.ndarray], place: slice, axis: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """A change of some rows or columns alone."""

    def apply(values: np.ndarray) -> np.ndarray:
        where = (place,) if axis == 0 else (slice(None), place)
        values = values.copy()
        values[where] = change(values[where])
        return values

    return apply


def shuffled(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """Rows in a random order."""
    rows = old.data.reshape(old.shape[0], -1)
    return replace(old, data=rows[rng.permutation(len(rows))].reshape(-1))


def shuffled_columns(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """Columns in a random order, as F32."""
    return stored(old, old.decode()[:, rng.permutation(old.shape[1])])


def copied_row(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """One row overwritten with another."""
    rows = old.data.reshape(old.shape[0], -1).copy()
    here, there = rng.choice(len(rows), 2, replace=False)
    rows[here] = rows[there]
    return replace(old, data=rows.reshape(-1))


def own_factors(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """Every row times a factor of its own."""
    return stored(old, old.decode() * rng.uniform(0.5, 2, (old.shape[0], 1)).astype(np.float32))


def moved_bytes(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """Read from a block further on; the end is what came next in the file."""
    size = max(FORMATS[old.block_type].block_bytes, 2)
    beyond = tensor(old.name, old.block_type, rng).data[:size]
    return replace(old, data=np.concatenate([old.data[size:], beyond]))


@dataclass(frozen=True)
class Accident:
    """One accident: what it is called, which tensor and types can have it, and how it is planted."""

    id: str
    plant: Plant
    name: str = GATE
    kinds: tuple[str, ...] = EVERY


def _blocks(kind: str, change: Callable[[np.ndarray], None]) -> Plant:
    def plant(old: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
        del rng
        data = old.data.copy()
        change(data.reshape(-1, FORMATS[kind].block_bytes))
        return replace(old, data=data)

    return plant


def _clear(first: int, end: int, mask: int = 0) -> Callable[[np.ndarray], None]:
    def change(blocks: np.ndarray) -> None:
        blocks[:, first:end] &= mask

    return change


def _pack_neighbours(first: int, end: int, apart: int) -> Callable[[np.ndarray], None]:
    """Element 2i and 2i + 1 in one byte, written out element by element."""

    def change(blocks: np.ndarray) -> None:
        for block in blocks:
            for start in range(first, end, apart):
                codes = [int(b) & 15 for b in block[start : start + apart]]
                codes += [int(b) >> 4 for b in block[start : start + apart]]
                for i in range(apart):
                    block[start + i] = codes[2 * i] | (codes[2 * i + 1] << 4)

    return change


def _swap_nibbles(first: int, end: int) -> Callable[[np.ndarray], None]:
    def change(blocks: np.ndarray) -> None:
        blocks[:, first:end] = blocks[:, first:end] // 16 + blocks[:, first:end] % 16 * 16

    return change


NIBBLES = {"Q4_0": (2, 18, 16), "Q4_1": (4, 20, 16), "Q5_0": (6, 22, 16), "Q5_1": (8, 24, 16)}
NIBBLES |= {"Q4_K": (16, 144, 32), "Q5_K": (48, 176, 32), "Q6_K": (0, 128, 64)}
HIGH = {"Q5_0": (2, 6), "Q5_1": (4, 8), "Q5_K": (16, 48), "Q6_K": (128, 192), "Q3_K": (0, 32)}
MINIMUM = {"Q4_1": (2, 4), "Q5_1": (2, 4), "Q4_K": (2, 4), "Q5_K": (2, 4), "Q2_K": (82, 84)}

# Accidents of the bytes of one block type.
FIELD_ACCIDENTS = (
    *(Accident("nibbles-reordered", _blocks(k, _pack_neighbours(*v)), kinds=(k,)) for k, v in NIBBLES.items()),
    *(Accident("nibbles-reordered", _blocks(k, _swap_nibbles(*v[:2])), kinds=(k,)) for k, v in NIBBLES.items()),
    *(Accident("high-bits-dropped", _blocks(k, _clear(*v)), kinds=(k,)) for k, v in HIGH.items()),
    *(Accident("minimum-lost", _blocks(k, _clear(*v)), kinds=(k,)) for k, v in MINIMUM.items()),
    *(Accident("scale-bits-dropped", _blocks(k, _clear(4, 12, 0x3F)), kinds=(k,)) for k in ("Q4_K", "Q5_K")),
)
# Accidents that any block type can have.
GENERAL_ACCIDENTS = (
    Accident("zeroed", by_values(np.zeros_like)),
    Accident("zeroed", by_values(some(np.zeros_like, slice(40, 60)))),
    Accident("zeroed", by_values(some(np.zeros_like, slice(HEAD, 2 * HEAD), 1)), O),
    Accident("rows-shifted", by_rows(lambda rows: np.roll(rows, 1, axis=0)), EMBEDDING),
    Accident("rows-shifted", by_rows(lambda rows: np.roll(rows, -1, axis=0)), EMBEDDING),
    Accident("rows-shifted", by_rows(lambda rows: np.concatenate([rows[3:], rows[-3:]])), EMBEDDING),
    Accident("rows-shifted", by_rows(lambda rows: np.concatenate([rows[:50], rows[49:-1]])), EMBEDDING),
    Accident("rows-shifted", by_values(lambda values: np.roll(values, 1, axis=1))),
    Accident("reversed", by_rows(lambda rows: rows[::-1])),
    Accident("reversed", by_values(lambda values: values[:, ::-1])),
    Accident("transposed", by_values(lambda values: values.T), O),
    Accident("dimensions-exchanged", by_values(lambda values: values.T.reshape(values.shape))),
    Accident("dimensions-exchanged", by_values(lambda values: values.reshape(values.shape[::-1]).T)),
    Accident("rotary-interleaved", by_rows(interleaved), Q),
    Accident("rotary-interleaved", by_rows(taken_apart), Q),
    Accident("heads-permuted", by_rows(in_order([2, 0, 1, 3])), Q),
    Accident("heads-permuted", by_rows(in_order([0, 0, 2, 2])), Q),
    Accident("heads-permuted", by_values(lambda values: in_order([0, 2, 1, 3])(values.T).T), O),
    Accident("rows-permuted", shuffled),
    Accident("rows-copied", copied_row, EMBEDDING),
    Accident("columns-permuted", shuffled_columns),
    Accident("scaled", by_values(lambda values: values * np.float32(1.5))),
    Accident("scaled", by_values(lambda values: -values)),
    Accident("scaled", by_values(some(lambda v: v * np.float32(0.125), slice(HEAD, 2 * HEAD))), Q),
    Accident("scaled", by_values(some(lambda v: v * np.float32(3), slice(0, HEAD), 1)), O),
    Accident("scaled", own_factors),
    Accident("shifted", by_values(lambda values: values + np.float32(1))),
    Accident("shifted", by_values(some(lambda v: v - np.float32(0.25), slice(7, 9)))),
    Accident("bytes-shifted", moved_bytes, kinds=(*PACKED, *PLAIN)),
)
