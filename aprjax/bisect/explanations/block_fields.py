"""What a faulty packer or unpacker does to the fields of blocks: nibbles, high bits, group scales, minimums.

Each accident is a change of the reference's bytes. A model of the same block type must then hold exactly those bytes,
and one of another type the values that those bytes decode to: a loader's fault shows as well as a writer's.
The byte ranges are those of ggml-common.h (see `aprjax.blocks.k_quants` and `blocks_of_32`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.pair import Pair, Values, distance, spread
from aprjax.blocks import block_format
from aprjax.checkpoint.types import EncodedTensor

_Change = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class _Layout:
    """Byte ranges of a block.

    Attributes:
        nibbles: the bytes that hold four bits of two elements each.
        chunk: how many of those bytes stand together: element i and i + chunk share a byte.
        high: the bytes of the remaining bits.
        scales: the groups' scales.
        minimum: the float16 minimum.
        scale: the float16 scale.
    """

    scale: slice
    nibbles: slice | None = None
    chunk: int = 16
    high: slice | None = None
    scales: slice | None = None
    minimum: slice | None = None
    codes: slice | None = None


LAYOUTS = {
    "Q4_0": _Layout(slice(0, 2), slice(2, 18)),
    "Q4_1": _Layout(slice(0, 2), slice(4, 20), minimum=slice(2, 4)),
    "Q5_0": _Layout(slice(0, 2), slice(6, 22), high=slice(2, 6)),
    "Q5_1": _Layout(slice(0, 2), slice(8, 24), high=slice(4, 8), minimum=slice(2, 4)),
    "Q8_0": _Layout(slice(0, 2), codes=slice(2, 34)),
    "Q2_K": _Layout(slice(80, 82), scales=slice(0, 16), minimum=slice(82, 84), codes=slice(16, 80)),
    "Q3_K": _Layout(slice(108, 110), high=slice(0, 32), scales=slice(96, 108), codes=slice(32, 96)),
    "Q4_K": _Layout(slice(0, 2), slice(16, 144), 32, scales=slice(4, 16), minimum=slice(2, 4)),
    "Q5_K": _Layout(slice(0, 2), slice(48, 176), 32, high=slice(16, 48), scales=slice(4, 16), minimum=slice(2, 4)),
    "Q6_K": _Layout(slice(208, 210), slice(0, 128), 64, high=slice(128, 192), scales=slice(192, 208)),
    "AprQ4": _Layout(slice(0, 2), slice(2, 18)),
}


def _neighbours(blocks: np.ndarray, *, layout: _Layout, inverse: bool) -> None:
    """Nibbles of neighbouring elements in one byte, instead of elements a chunk apart; or the inverse."""
    assert layout.nibbles is not None
    stored = blocks[:, layout.nibbles].reshape(len(blocks), -1, layout.chunk)
    low, high = stored & 15, stored >> 4
    if inverse:
        order = np.stack([low, high], axis=-1).reshape(*stored.shape[:2], -1)
        packed = order[..., : layout.chunk] | (order[..., layout.chunk :] << 4)
    else:
        order = np.concatenate([low, high], axis=-1)
        packed = order[..., 0::2] | (order[..., 1::2] << 4)
    blocks[:, layout.nibbles] = packed.reshape(len(blocks), -1)


def _exchange_nibbles(blocks: np.ndarray, *, part: slice) -> None:
    blocks[:, part] = (blocks[:, part] >> 4) | (blocks[:, part] << 4)


def _mask(blocks: np.ndarray, *, part: slice, bits: int) -> None:
    blocks[:, part] &= bits


def _exchange(blocks: np.ndarray, *, one: slice, other: slice) -> None:
    kept = blocks[:, one].copy()
    blocks[:, one] = blocks[:, other]
    blocks[:, other] = kept


def _nibble_changes(name: str) -> Iterator[tuple[str, _Change]]:
    layout = LAYOUTS.get(name)
    if layout is None or layout.nibbles is None:
        return
    order = f"the {name} codes are the reference's in another order within each block: nibble order"
    yield f"{order}, neighbours share a byte", partial(_neighbours, layout=layout, inverse=False)
    yield f"{order}, neighbours' bytes taken for halves", partial(_neighbours, layout=layout, inverse=True)
    yield f"{order}, the two of each byte exchanged", partial(_exchange_nibbles, part=layout.nibbles)


def _high_bit_changes(name: str) -> Iterator[tuple[str, _Change]]:
    layout = LAYOUTS.get(name)
    if layout is not None and layout.high is not None:
        words = f"the high bits of the {name} codes are dropped (bytes {layout.high.start} to {layout.high.stop - 1})"
        yield words, partial(_mask, part=layout.high, bits=0)


def _scale_bit_changes(name: str) -> Iterator[tuple[str, _Change]]:
    words = f"only the sub-block scales of the {name} blocks differ, bits of it cleared"
    if name in ("Q4_K", "Q5_K"):
        lost = f"{words}: the high bits of groups 4 to 7"
        yield f"{lost} (bytes 4 to 11)", partial(_mask, part=slice(4, 12), bits=0x3F)
        yield f"{lost} (bytes 4 to 15)", partial(_mask, part=slice(4, 16), bits=0x3F)
    elif name == "Q3_K":
        yield f"{words}: the upper two (bytes 104 to 107)", partial(_mask, part=slice(104, 108), bits=0)


def _minimum_changes(name: str) -> Iterator[tuple[str, _Change]]:
    layout = LAYOUTS.get(name)
    if layout is None or layout.minimum is None:
        return
    yield f"the minimum of the {name} blocks is left out", partial(_mask, part=layout.minimum, bits=0)
    if name == "Q2_K":
        words = f"the minimums of the {name} groups are zero (upper nibbles of bytes 0 to 15)"
        yield words, partial(_mask, part=slice(0, 16), bits=0x0F)
    both = partial(_exchange, one=layout.scale, other=layout.minimum)
    yield f"scale and minimum of the {name} blocks are exchanged", both


def _changed(changes: Callable[[str], Iterator[tuple[str, _Change]]], pair: Pair) -> Iterator[Candidate]:
    if not pair.same_shape:
        return
    for words, change in changes(pair.theirs.block_type):
        if pair.same_encoding and pair.ours.data.size == pair.theirs.data.size:
            yield from _by_bytes(pair, words, change)
        elif not block_format(pair.ours.block_type).quantized and pair.b.addressable:
            # Decoded by the faulty reader: in F16 its values were rounded once more.
            changed = Values(replace(pair.theirs, data=_after(pair.theirs, change)))
            rows = pair.some_rows(8)
            left = distance(pair.a.rows(rows), changed.rows(rows))
            if left > 0.5:
                yield Candidate(words, left, "sampled rows", {"detail": words}, sampled=True)
                continue
            residual, basis = pair.residual(changed.rows)
            yield Candidate(words, residual, basis, {"type": pair.theirs.block_type})


def _by_bytes(pair: Pair, words: str, change: _Change) -> Iterator[Candidate]:
    blocks = block_format(pair.theirs.block_type)
    ours, theirs = (t.data.reshape(-1, blocks.block_bytes) for t in (pair.ours, pair.theirs))
    some = _differing_blocks(ours, theirs)
    tried = theirs[some].copy()
    change(tried)
    if not np.array_equal(tried, ours[some]):
        with np.errstate(all="ignore"):
            left = distance(blocks.decode(ours[some]), blocks.decode(tried))
        if np.isfinite(left):
            yield Candidate(words, left, "sampled blocks", {"detail": words}, sampled=True)
        return
    step = max(1, (1 << 22) // blocks.block_bytes)
    differing = 0
    for start in range(0, len(theirs), step):
        mine, made = ours[start : start + step], theirs[start : start + step].copy()
        unequal = (mine != made).any(axis=1)
        change(made)
        # Some rows alone may be hurt: a block is either as it was or as the accident makes it.
        if not np.array_equal(mine[unequal], made[unequal]):
            return
        differing += int(unequal.sum())
    parameters = {"type": pair.theirs.block_type, "blocks": differing, "of": len(theirs)}
    yield Candidate(words, 0.0, "all bytes", parameters)


def _differing_blocks(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """A few differing blocks, spread over the tensor; a sample that misses them all looks from the start."""
    looked = spread(len(ours), 4096)
    found = looked[(ours[looked] != theirs[looked]).any(axis=1)]
    if not found.size:
        step = 1 << 16
        for start in range(0, len(ours), step):
            found = start + np.flatnonzero((ours[start : start + step] != theirs[start : start + step]).any(axis=1))
            if found.size:
                break
    return found[spread(found.size, 256)]


def _after(tensor: EncodedTensor, change: _Change) -> np.ndarray:
    """A tensor's bytes after the accident."""
    blocks = tensor.data.reshape(-1, block_format(tensor.block_type).block_bytes).copy()
    change(blocks)
    return blocks.reshape(-1)


def only_field(pair: Pair) -> str | None:
    """The one field in which the blocks differ, where the types are the same: a remark, no explanation."""
    layout = LAYOUTS.get(pair.ours.block_type)
    if layout is None or not pair.same_encoding or pair.ours.data.size != pair.theirs.data.size:
        return None
    size = block_format(pair.ours.block_type).block_bytes
    ours, theirs = (t.data.reshape(-1, size) for t in (pair.ours, pair.theirs))
    differs = np.zeros(size, bool)
    step = max(1, (1 << 22) // size)
    for start in range(0, len(ours), step):
        differs |= (ours[start : start + step] != theirs[start : start + step]).any(axis=0)
    scale = np.zeros(size, bool)
    for part in (layout.scale, layout.minimum):
        if part is not None:
            scale[part] = True
    groups = np.zeros(size, bool)
    if layout.scales is not None:
        groups[layout.scales] = True
    fields = {"block scale (d, dmin)": scale, "sub-block scales": groups, "codes": ~scale & ~groups}
    named = [name for name, place in fields.items() if (differs & place).any()]
    return f"only the {named[0]} of the {pair.ours.block_type} blocks differ" if len(named) == 1 else None


# By hypothesis: the accidents of a block type in words, each with a change of `uint8[blocks, bytes]` in place.
CHANGES: dict[str, Callable[[str], Iterator[tuple[str, _Change]]]] = {
    "nibbles-reordered": _nibble_changes,
    "high-bits-dropped": _high_bit_changes,
    "scale-bits-dropped": _scale_bit_changes,
    "minimum-lost": _minimum_changes,
}
_READER = "correct the unpacking of the blocks (ggml-common.h has the layout), or convert again from the reference"
HYPOTHESES = tuple(Hypothesis(slug, partial(_changed, changes), _READER) for slug, changes in CHANGES.items())
