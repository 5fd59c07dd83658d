"""The same bytes read as another type or from another place, and values that went through another block type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from aprjax.bisect.explanations.evidence import Candidate, Hypothesis
from aprjax.bisect.explanations.pair import Pair, Values, distance, slices, spread
from aprjax.blocks import FORMATS, BlockFormat, block_format, byte_size, dequantize, encode

# Bytes that are searched for in the reference's tensor, and how far from their own place.
_NEEDLE, _REACH = 256, 1 << 20
# Elements decoded to try a block type.
_TRIED = 4096
# Encoding a K-quant costs a hundred times its decoding: beyond so many elements a sample must do.
_ENCODED_LIMIT = 1 << 17
# Elements encoded to see whether more are worth it, and the largest block size.
_QUICK, _QUICK_STEP = 1024, 256


def _misread(pair: Pair) -> Iterator[Candidate]:
    """Equal bytes under another type's name; or the reference's bytes decoded as another type."""
    ours, theirs = pair.ours, pair.theirs
    if ours.block_type != theirs.block_type and theirs.data.any():
        common = min(ours.data.size, theirs.data.size)
        if common >= min(_NEEDLE, theirs.data.size) and np.array_equal(ours.data[:common], theirs.data[:common]):
            words = f"the model reads the reference's {theirs.block_type} bytes as {ours.block_type}"
            yield Candidate(words, 0.0, "all bytes", {"read_as": ours.block_type, "type": theirs.block_type})
            return
    if not pair.same_shape:
        return
    known = pair.a.rows(np.arange(min(pair.shape[0], 1 + _TRIED // max(1, pair.shape[1])))).ravel()[:_TRIED]
    if not known.any():
        return
    for blocks in FORMATS.values():
        if blocks.name == theirs.block_type or byte_size(blocks.name, theirs.shape) > theirs.data.size:
            continue
        values = _first(blocks, theirs.data, known.size)
        if not _bits_equal(values, known):
            continue
        size = byte_size(blocks.name, theirs.shape)
        whole = dequantize(blocks.name, theirs.data[:size], theirs.shape).reshape(pair.shape)
        # Bytes of another type may decode to NaN, of which no distance can be taken.
        if all(_bits_equal(pair.a.rows(window), whole[window]) for window in slices(*pair.shape)):
            residual, basis = 0.0, "all values"
        else:
            residual, basis = pair.residual(lambda window, whole=whole: whole[window])
        words = f"the model's values are the reference's {theirs.block_type} bytes decoded as {blocks.name}"
        yield Candidate(words, residual, basis, {"read_as": blocks.name, "type": theirs.block_type})


def _first(blocks: BlockFormat, data: np.ndarray, count: int) -> np.ndarray:
    whole = -(-count // blocks.block_size)
    head = data[: blocks.header_bytes + whole * blocks.block_bytes]
    with np.errstate(all="ignore"):
        return dequantize(blocks.name, head, (whole * blocks.block_size,))[:count]


def _bits_equal(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(left, right, equal_nan=True))


def _byte_order(pair: Pair) -> Iterator[Candidate]:
    width = block_format(pair.theirs.block_type).block_bytes
    if not pair.same_encoding or block_format(pair.theirs.block_type).quantized or width == 1:
        return
    swapped = pair.theirs.data.reshape(-1, width)[:, ::-1].reshape(-1)
    if pair.ours.data.size == swapped.size and np.array_equal(pair.ours.data, swapped):
        yield Candidate("the model's values have the reference's bytes in reverse order", 0.0, "all bytes")


def _moved(pair: Pair) -> Iterator[Candidate]:
    """The bytes of the reference's tensor from another place on: a wrong offset in the index."""
    ours, theirs = pair.ours.data, pair.theirs.data
    if not pair.same_encoding or ours.size != theirs.size or ours.size < 4 * _NEEDLE:
        return
    middle = ours.size // 2
    needle = ours[middle : middle + _NEEDLE]
    # A run of one byte would be found everywhere.
    if np.unique(needle).size < 8:
        return
    start = max(0, middle - _REACH)
    at = theirs[start : middle + _NEEDLE + _REACH].tobytes().find(needle.tobytes())
    by = start + at - middle
    if at < 0 or by == 0:
        return
    inside = slice(max(0, -by), min(ours.size, ours.size - by))
    if not np.array_equal(ours[inside], theirs[inside.start + by : inside.stop + by]):
        return
    rows, extra = divmod(abs(by), theirs.size // pair.shape[0])
    if extra == 0:
        return  # whole rows: `rows-shifted` says it better
    words = f"the model's bytes are the reference's from {abs(by)} bytes {'further on' if by > 0 else 'before'}"
    blocks = block_format(pair.ours.block_type).block_bytes
    detail = f" ({abs(by) // blocks} blocks of {pair.ours.block_type})" if abs(by) % blocks == 0 else ""
    kept = "all bytes" if inside.stop - inside.start == ours.size else "all bytes but those beyond the end"
    yield Candidate(words + detail, 0.0, kept, {"bytes": by, "rows": rows})


def _rounded(pair: Pair) -> Iterator[Candidate]:
    """The same values to within the steps of a block type: quantized once more, by another quantizer, or not at all."""
    if not pair.same_shape or pair.row_errors is None or pair.row_norms is None:
        return
    ours, theirs = pair.ours.block_type, pair.theirs.block_type
    coarse = ours if pair.own_rounding >= pair.either_rounding else theirs
    residual = pair.judged(pair.row_errors, pair.row_norms)
    words = f"the model's {ours} values are the reference's {theirs} to within the rounding of {coarse}"
    yield Candidate(words, residual, "all values", {"type": coarse})


def _encoded_again(pair: Pair) -> Iterator[Candidate]:
    """What an encoder makes of the reference's decoded values."""
    if not pair.same_shape:
        return
    ours, theirs = pair.ours.block_type, pair.theirs.block_type
    for through in (name for name, blocks in FORMATS.items() if blocks.encode is not None and name != "F32"):
        if through == ours:
            words = f"the model's blocks are the reference's {theirs} values encoded again, as {ours}"
            yield from _tried(pair, words, (through,), {"through": through})
        else:
            words = f"the model's {ours} values are the reference's {theirs} values after a passage through {through}"
            yield from _tried(pair, words, (through, ours), {"through": through})


def _source(pair: Pair) -> Iterator[Candidate]:
    """The reverse: the reference is what an encoder makes of the model's values."""
    theirs = block_format(pair.theirs.block_type)
    if not pair.same_shape or theirs.encode is None or theirs.name == "F32":
        return
    other = Pair(pair.name, pair.theirs, pair.ours, pair.ref, pair.model, pair.rel_l2, pair.rows, pair.columns)
    words = f"the reference's {theirs.name} blocks are the model's {pair.ours.block_type} values, encoded"
    # The distances of the others are relative to the reference; of this one only equality says something.
    yield from (c for c in _tried(other, words, (theirs.name,), {"type": theirs.name}) if c.residual == 0.0)


def _tried(pair: Pair, words: str, through: tuple[str, ...], parameters: dict[str, str]) -> Iterator[Candidate]:
    """The model's values against the reference's after a chain of encoders: the first few, then more of them."""
    if pair.ours.row_padded or pair.theirs.row_padded or block_format(through[-1]).encode is None:
        return
    head = pair.theirs.size if pair.theirs.size <= _QUICK else _QUICK
    left = distance(_flat(pair.a, head), _through(_flat(pair.b, head), through))
    if left != 0.0:
        yield Candidate(words, left, f"the first {head} values", parameters, sampled=True)
        return
    if pair.theirs.size <= _ENCODED_LIMIT or pair.shape[1] % _QUICK_STEP:
        head = min(pair.theirs.size, _ENCODED_LIMIT)
        left = distance(_flat(pair.a, head), _through(_flat(pair.b, head), through))
        basis = "all values" if head == pair.theirs.size else f"the first {head} values"
    else:
        rows = spread(pair.shape[0], _ENCODED_LIMIT // pair.shape[1])
        left = distance(pair.a.rows(rows), _through(pair.b.rows(rows), through))
        basis = f"{rows.size} sampled rows"
    yield Candidate(words, left, basis, parameters)


def _flat(values: Values, count: int) -> np.ndarray:
    """The first values in row-major order: they begin with a block however the rows lie."""
    return values.rows(np.arange(-(-count // max(1, values.shape[1])))).ravel()[:count]


def _through(values: np.ndarray, types: tuple[str, ...]) -> np.ndarray:
    for name in types:
        values = dequantize(name, encode(name, np.where(np.isfinite(values), values, 0.0)), values.shape)
    return values


def encoded_alike(pair: Pair, candidate: Candidate) -> Candidate:
    """A candidate that leaves something, proved: its values, encoded as the model's block type, are the model's."""
    blocks = block_format(pair.ours.block_type)
    if candidate.residual == 0.0 or candidate.predict is None or blocks.encode is None or blocks.name == "F32":
        return candidate
    if pair.ours.row_padded or not pair.a.addressable or pair.shape[1] % blocks.block_size:
        return candidate
    rows = spread(pair.shape[0], max(1, _ENCODED_LIMIT // pair.shape[1]))
    if distance(pair.a.rows(rows), _through(candidate.predict(rows), (blocks.name,))) != 0.0:
        return candidate
    basis = "all values" if rows.size == pair.shape[0] else f"{rows.size} sampled rows"
    return replace(
        candidate,
        sentence=f"{candidate.sentence}, and encoded again as {blocks.name}",
        residual=0.0,
        basis=f"{basis}, encoded",
        parameters={**candidate.parameters, "encoded_as": blocks.name, "before_encoding": candidate.residual},
    )


SAME_BYTES = (
    Hypothesis("type-misread", _misread, "correct the block type in the converter, or in the reader's table of types"),
    Hypothesis("byte-order", _byte_order, "write the values little-endian"),
    Hypothesis(
        "bytes-shifted", _moved, "correct the tensor's offset: alignment and header size are the usual suspects"
    ),
)
ROUNDED = (
    Hypothesis(
        "rounded",
        _rounded,
        "nothing is broken: to compare engines, give both the same file; `python -m aprjax convert --keep-blocks` "
        "keeps the blocks",
    ),
)
ENCODED_AGAIN = (
    Hypothesis("double-quantized", _encoded_again, "convert from the original weights, or keep the blocks as they are"),
    Hypothesis("quantized-from-model", _source, "nothing is broken: the reference is the model's own quantization"),
)
