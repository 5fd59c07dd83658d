"""Exact integer dots for one token: sums of some products in int16, elementwise over the rows.

One token shares no decoded weight with another, so that decoding to floats for a matrix product costs more than the
product. Here nothing is decoded into memory: a sum over a group of elements is one expression over bit planes, which
XLA compiles to one loop over the rows. A product `code * activation` fits int16, and as many of them as
`terms_together` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from aprjax.blocks.registry import block_format
from aprjax.blocks.relay import CODE_WIDTHS, Relaid

_LARGEST_ACTIVATION = 127
_LARGEST_INT16 = (1 << 15) - 1
# Longer expressions gain nothing: a group's sum is written once for this many elements.
_MOST_TERMS = 32


# Of the others the bit planes have so many segments, or the scales cover so few elements, that nothing is gained.
_FASTER = {"Q3_K", "Q4_0", "Q4_K", "Q8_0"}


def pays_for_one_token(name: str) -> bool:
    """Whether this is faster than a matrix product of one row (benchmarks/bench_dot.py times both)."""
    return name in _FASTER


def terms_together(name: str) -> int:
    """How many products of a code and an activation one int16 holds the sum of: a power of two."""
    most = _LARGEST_INT16 // (CODE_WIDTHS[name].largest * _LARGEST_ACTIVATION)
    return 1 << (most.bit_length() - 1)


def _segments(chunk: Relaid) -> Iterator[list[tuple[Any, int, int]]]:
    """Runs of elements that lie in each bit plane at one shift: (bytes `[b, run, r]`, shift, width) of each plane."""
    planes = CODE_WIDTHS[chunk.name].planes
    run = min(plane.shape[1] for plane in chunk.codes)
    for start in range(0, block_format(chunk.name).block_size, run):
        segment = []
        for plane, bits in zip(chunk.codes, planes, strict=True):
            held = plane.shape[1]
            segment.append((plane[:, start % held : start % held + run], start // held * bits, bits))
        yield segment


def part_sums(chunk: Relaid, activations: Any) -> Any:
    """Exact sums of codes times activations over each group that shares a scale, or part of it.

    Args:
        chunk: rows of weights, block axis first (`Relaid.chunk`).
        activations: int8 `[b, size]`, one token's.

    Returns:
        int32 `[b, parts, r]`: consecutive parts of a block, as many for each group.
    """
    name, size = chunk.name, block_format(chunk.name).block_size
    groups = 1 if chunk.group_scales is None else chunk.group_scales.shape[1]
    width = CODE_WIDTHS[name]
    length = min(size // groups, _MOST_TERMS, *(plane.shape[1] for plane in chunk.codes))
    together = min(terms_together(name), length)
    blocks = activations.shape[0]
    segments = list(_segments(chunk)) if width.planes else [[(chunk.codes[0], 0, 8)]]
    by_part = activations.astype(jnp.int16).reshape(blocks, len(segments), -1, length)

    def code(segment: list[tuple[Any, int, int]], element: int) -> Any:
        joined, done = None, 0
        for plane, shift, bits in segment:
            part = plane.reshape(blocks, -1, length, plane.shape[-1])[:, :, element]
            if width.planes:
                part = ((part >> jnp.uint8(shift)) & jnp.uint8((1 << bits) - 1)) << jnp.uint8(done)
            joined = part if joined is None else joined | part
            done += bits
        assert joined is not None
        return joined.astype(jnp.int16) - jnp.int16(width.offset)

    sums = []
    for index, segment in enumerate(segments):
        total = None
        for start in range(0, length, together):
            short = None
            for element in range(start, start + together):
                product = code(segment, element) * by_part[:, index, :, element, None]
                short = product if short is None else short + product
            assert short is not None
            total = short.astype(jnp.int32) if total is None else total + short.astype(jnp.int32)
        sums.append(total)
    return jnp.concatenate(sums, axis=1)


def block_integers(sums: Any, group_scales: Any) -> Any:
    """One block's dot from its `part_sums` `[parts, r]`: int32 `[1, r]`."""
    if group_scales is not None:
        grouped = sums.reshape(group_scales.shape[0], -1, sums.shape[-1]).sum(axis=1)
        sums = grouped * group_scales.astype(jnp.int32)
    return sums.sum(axis=0, keepdims=True)
