"""What happened to a tensor? A short search for the everyday explanations of differing values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprjax.blocks import block_format
from aprjax.checkpoint.types import Checkpoint, EncodedTensor

# Rows looked at: enough for a cosine to tell any two unrelated matrices apart (unrelated rows of
# width w have a cosine of about 1/sqrt(w)), few enough to cost nothing.
_SAMPLED_ROWS = 64
# Rounding to n levels leaves a relative error of about 1/n: two 4-bit encodings of one matrix differ by about 0.1,
# a cosine of 0.99. Unrelated rows are far below (see _SAMPLED_ROWS), so anything between would do.
_SAME = 0.98
_REARRANGED_LIMIT = 1 << 25


def explain_difference(
    ours: EncodedTensor,
    theirs: EncodedTensor,
    *,
    rel_l2: float | None,
    rows: int,
    first_row: int | None,
    ref: Checkpoint,
) -> str:
    """One sentence on how the model's tensor differs from the reference's."""
    size = f"relative L2 {rel_l2:.2g}" if rel_l2 is not None else "not comparable"
    where = _where(ours, rows, first_row)
    cause = _cause(ours, theirs, ref, rows)
    return f"{cause} ({size}{where})"


def _where(ours: EncodedTensor, rows: int, first_row: int | None) -> str:
    if len(ours.shape) < 2 or first_row is None:
        return ""
    if rows == 1:
        return f", row {first_row} alone"
    return f", {rows} of {ours.shape[0]} rows" if rows < ours.shape[0] else ", every row"


def _cause(ours: EncodedTensor, theirs: EncodedTensor, ref: Checkpoint, rows: int) -> str:
    a, b = _sample(ours), _sample(theirs)
    if not np.isfinite(a).all() or (ours.size <= _REARRANGED_LIMIT and not np.isfinite(ours.decode()).all()):
        bad = ours.decode().reshape(-1)
        at = int(np.flatnonzero(~np.isfinite(bad))[0])
        return f"the model's values are not finite (first: {bad[at]} at element {at})"
    if not a.any() and b.any():
        return "the model's values are all zero"
    twin = _under_another_name(ours, theirs, ref)
    if twin is not None:
        return f"the model holds the reference's {twin} under this name"
    # Before anything that decodes: rows that moved take their scales along, so that one field alone tells enough.
    fields = _fields(ours, theirs)
    if fields is not None:
        return fields
    rearranged = _rearranged(ours, theirs) if rows > 1 else None
    if rearranged is not None:
        return f"the model's values are the reference's, {rearranged}"
    scale = _scale(a, b)
    if scale is not None:
        return f"the model's values are the reference's times {scale:.6g}"
    return "the decoded values differ"


def _sample(tensor: EncodedTensor) -> np.ndarray:
    """Some rows, evenly spread, decoded."""
    if len(tensor.shape) < 2:
        return tensor.decode()[None]
    if block_format(tensor.block_type).flat:
        return tensor.decode()[:: max(1, tensor.shape[0] // _SAMPLED_ROWS)]
    rows = np.unique(np.linspace(0, tensor.shape[0] - 1, _SAMPLED_ROWS).astype(int))
    return tensor.decode_rows(rows)


def _under_another_name(ours: EncodedTensor, theirs: EncodedTensor, ref: Checkpoint) -> str | None:
    """The reference's tensor that holds exactly the model's bytes or values, if it is not the same-named one."""
    first = _first_row(ours)
    for name, other in ref.tensors.items():
        if name == theirs.name or other.shape != ours.shape:
            continue
        if other.block_type == ours.block_type:
            if bytes(other.data[:64]) == bytes(ours.data[:64]) and np.array_equal(other.data, ours.data):
                return name
        elif np.array_equal(_first_row(other), first) and np.array_equal(_sample(other), _sample(ours)):
            return name
    return None


def _first_row(tensor: EncodedTensor) -> np.ndarray:
    whole = len(tensor.shape) < 2 or block_format(tensor.block_type).flat
    return tensor.decode() if whole else tensor.decode_rows(slice(0, 1))


def _rearranged(ours: EncodedTensor, theirs: EncodedTensor) -> str | None:
    """Transposed, or shifted by a row, as far as a few rows can tell."""
    if len(ours.shape) != 2:
        return None
    rows, columns = ours.shape
    if block_format(ours.block_type).flat or block_format(theirs.block_type).flat:
        return None
    index = np.unique(np.linspace(1, rows - 2, min(16, rows)).astype(int)) if rows > 2 else np.arange(rows)
    a = ours.decode_rows(index)
    for shift, words in ((-1, "shifted down by one row"), (1, "shifted up by one row")):
        if rows > 2 and _cosine(a, theirs.decode_rows((index + shift) % rows)) > _SAME:
            return words
    if ours.size <= _REARRANGED_LIMIT:
        values = theirs.decode()
        if rows == columns and _cosine(a, values.T[index]) > _SAME:
            return "transposed"
        exchanged = (values.T.reshape(rows, columns), values.reshape(columns, rows).T)
        if any(_cosine(a, other[index]) > _SAME for other in exchanged):
            return "with its two dimensions exchanged"
        if _cosine(a, values[:, ::-1][index]) > _SAME:
            return "with every row reversed"
    return None


@dataclass(frozen=True)
class _Fields:
    """Byte ranges of a K-quant block: kernels.md section 1."""

    scales: slice
    codes: slice
    super_scale: slice


_BLOCK_FIELDS = {
    "Q4_K": _Fields(slice(4, 16), slice(16, 144), slice(0, 4)),
    "Q5_K": _Fields(slice(4, 16), slice(16, 176), slice(0, 4)),
    "Q6_K": _Fields(slice(192, 208), slice(0, 192), slice(208, 210)),
    "Q2_K": _Fields(slice(0, 16), slice(16, 80), slice(80, 84)),
    "Q3_K": _Fields(slice(96, 108), slice(0, 96), slice(108, 110)),
}


def _fields(ours: EncodedTensor, theirs: EncodedTensor) -> str | None:
    """Which field of the blocks differs, where both sides use one K-quant."""
    fields = _BLOCK_FIELDS.get(ours.block_type)
    if fields is None or ours.block_type != theirs.block_type:
        return None
    size = block_format(ours.block_type).block_bytes
    a, b = ours.data.reshape(-1, size), theirs.data.reshape(-1, size)
    differs = {
        "sub-block scales": not np.array_equal(a[:, fields.scales], b[:, fields.scales]),
        "codes": not np.array_equal(a[:, fields.codes], b[:, fields.codes]),
        "block scale (d, dmin)": not np.array_equal(a[:, fields.super_scale], b[:, fields.super_scale]),
    }
    named = [name for name, unequal in differs.items() if unequal]
    if named == ["codes"] and _same_nibbles(a[:, fields.codes], b[:, fields.codes]):
        return f"the {ours.block_type} codes are the reference's in another order within each block: nibble order"
    if len(named) == 1:
        detail = ""
        if named == ["sub-block scales"]:
            lost = not np.any(a[:, fields.scales] & ~b[:, fields.scales])
            detail = ", bits of it cleared" if lost else ""
        return f"only the {named[0]} of the {ours.block_type} blocks differ{detail}"
    return None


def _same_nibbles(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether every block holds the same nibbles, in whatever order (looked up in a sample of blocks)."""
    step = max(1, len(a) // 4096)
    ours, theirs = (np.sort(np.concatenate([x[::step] & 15, x[::step] >> 4], axis=1), axis=1) for x in (a, b))
    return np.array_equal(ours, theirs)


def _scale(a: np.ndarray, b: np.ndarray) -> float | None:
    """The constant factor between the two, if there is one."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(y @ y)
    if norm == 0:
        return None
    factor = float(x @ y) / norm
    residual = x - factor * y
    # float32 and a re-rounded float16 scale leave up to 2^-11 of the values.
    return factor if float(residual @ residual) < (2.0**-11) ** 2 * norm and factor != 0 else None


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norms if norms else 0.0
