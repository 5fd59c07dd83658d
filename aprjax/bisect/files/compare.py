"""The static comparison: do two files hold the same model, and if not, what happened? Cheapest cause first.

Bytes are compared before values, and values are decoded a few rows at a time, so that files of any size cost no more
memory than slices of a few tensors. Tensors are independent, and NumPy lets go of the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from aprjax.bisect.explanations import Diagnosis, Pair, explain
from aprjax.bisect.explanations.pair import Values, slices
from aprjax.bisect.files.report import FilesReport, TensorDifference, WorstRow
from aprjax.checkpoint.mapped_file import release_pages
from aprjax.checkpoint.types import Checkpoint, EncodedTensor

# Tensors looked at side by side. Each may hold a whole decoded tensor for a while, and memory is as fast as two.
_THREADS = 2
_WORST_ROWS = 5


def compare_files(
    model: Checkpoint,
    ref: Checkpoint,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    decode: bool = False,
) -> FilesReport:
    """Compares configs and every tensor of two checkpoints, and searches for what happened to those that differ.

    A head that one side leaves to be tied is compared as the embedding that stands for it.

    Args:
        model: the side under suspicion.
        ref: the side it is judged by.
        progress: told how many tensors of how many are done.
        decode: decode both sides of every tensor, even where the bytes are equal.
    """
    ours, theirs = model.config.to_json(), ref.config.to_json()
    config = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    names = list(dict.fromkeys([*ref.tensors, *model.tensors]))

    def look(name: str) -> _Compared:
        pair = _tensor(model, name), _tensor(ref, name)
        compared = _compare(*pair, name, (model, ref), decode=decode)
        for tensor in pair:
            if tensor is not None:
                release_pages(tensor.data)
        return compared

    differences: list[TensorDifference] = []
    decoded = 0
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for index, compared in enumerate(pool.map(look, names)):
            progress(index, len(names))
            decoded += compared.decoded
            if compared.difference is not None:
                differences.append(compared.difference)
    progress(len(names), len(names))
    return FilesReport(config, tuple(differences), len(names), len(names) - len(differences), decoded)


@dataclass(frozen=True)
class _Compared:
    difference: TensorDifference | None
    decoded: bool = False


def _tensor(checkpoint: Checkpoint, name: str) -> EncodedTensor | None:
    found = checkpoint.tensors.get(name)
    if found is None and name == "lm_head.weight":
        return checkpoint.tensors.get("model.embed_tokens.weight")
    return found


def _compare(
    ours: EncodedTensor | None,
    theirs: EncodedTensor | None,
    name: str,
    sides: tuple[Checkpoint, Checkpoint],
    *,
    decode: bool,
) -> _Compared:
    if ours is None or theirs is None:
        return _Compared(_missing(ours, theirs, name))
    types, shapes = (ours.block_type, theirs.block_type), (ours.shape, theirs.shape)
    if ours.shape != theirs.shape:
        return _Compared(_other_shape(Pair(name, ours, theirs, *sides, None, np.empty(0, np.int64))))
    same_encoding = ours.block_type == theirs.block_type and ours.row_padded == theirs.row_padded
    same_bytes = same_encoding and np.array_equal(ours.data, theirs.data)
    if same_bytes and not decode:
        return _Compared(None)
    found = _decoded_distance(ours, theirs)
    if same_bytes and found.rows.size == 0:
        return _Compared(None, decoded=True)
    vector = len(ours.shape) < 2
    rows = min(1, found.rows.size) if vector else found.rows.size
    first = (0 if vector else int(found.rows[0])) if rows else None
    difference = TensorDifference(
        name, types, found.rel_l2, found.cosine, rows, first, "", max_abs=found.max_abs, shapes=shapes
    )
    if found.rel_l2 == 0.0:
        return _Compared(difference, decoded=True)
    pair = Pair(name, ours, theirs, *sides, found.rel_l2, found.rows, found.columns, found.row_errors, found.row_norms)
    where = _where(ours, rows, first)
    return _Compared(_explained(difference, explain(pair), where=where, worst=found.worst(vector=vector)), decoded=True)


def _missing(ours: EncodedTensor | None, theirs: EncodedTensor | None, name: str) -> TensorDifference:
    side, other = ("model", theirs) if ours is None else ("reference", ours)
    types = (ours and ours.block_type, theirs and theirs.block_type)
    shape = list(other.shape) if other is not None else []
    text = f"missing in the {side} (shape {shape} in the other)"
    return TensorDifference(
        name,
        types,
        None,
        None,
        0,
        None,
        text,
        explanation_id="missing",
        parameters={"side": side},
        next_step="convert the model again: the converter left the tensor out, or named it otherwise",
        shapes=(ours and ours.shape, theirs and theirs.shape),
    )


def _other_shape(pair: Pair) -> TensorDifference:
    ours, theirs = pair.ours, pair.theirs
    text = f"shape {list(ours.shape)} in the model, {list(theirs.shape)} in the reference"
    types = (ours.block_type, theirs.block_type)
    difference = TensorDifference(
        name=pair.name,
        block_types=types,
        rel_l2=None,
        cosine=None,
        rows=0,
        first_row=None,
        explanation=text,
        shapes=(ours.shape, theirs.shape),
    )
    difference = replace(difference, next_step="convert the model again: the two tensors are of different sizes")
    # Only reversed dimensions can hold the same values.
    if ours.shape != theirs.shape[::-1]:
        return difference
    diagnosis = explain(pair)
    if diagnosis.explanation is None:
        return difference
    return _explained(difference, diagnosis, prefix=text)


def _explained(
    difference: TensorDifference,
    diagnosis: Diagnosis,
    *,
    where: str = "",
    worst: tuple[WorstRow, ...] = (),
    prefix: str = "",
) -> TensorDifference:
    """The difference with what the search came to."""
    size = "not comparable" if difference.rel_l2 is None else f"relative L2 {difference.rel_l2:.2g}"
    sentence = diagnosis.sentence()
    text = f"{prefix}: {sentence}" if prefix else f"{sentence} ({size}{where})"
    found = diagnosis.explanation
    difference = replace(
        difference, explanation=text, excluded=diagnosis.excluded, worst_rows=worst, tolerance=diagnosis.tolerance
    )
    if found is None:
        step = "compare the two by rows (worst_rows), and convert the model again from the reference"
        return replace(difference, next_step=step)
    return replace(
        difference,
        explanation_id=found.id,
        parameters=found.parameters,
        residual=found.residual,
        basis=found.basis,
        next_step=found.next_step,
    )


def _where(ours: EncodedTensor, rows: int, first_row: int | None) -> str:
    if len(ours.shape) < 2 or first_row is None:
        return ""
    if rows == 1:
        return f", row {first_row} alone"
    return f", {rows} of {ours.shape[0]} rows" if rows < ours.shape[0] else ", every row"


@dataclass(frozen=True)
class _Distance:
    """What one pass over the decoded values of both sides tells; of a vector, rows are its elements."""

    rel_l2: float | None
    cosine: float | None
    max_abs: float | None
    rows: np.ndarray
    columns: np.ndarray
    row_errors: np.ndarray
    row_norms: np.ndarray

    def worst(self, *, vector: bool) -> tuple[WorstRow, ...]:
        """The rows that differ most."""
        if vector or not self.rows.size:
            return ()
        with np.errstate(all="ignore"):
            relative = np.sqrt(self.row_errors / self.row_norms)
        order = np.argsort(-np.where(np.isnan(relative), np.inf, relative), kind="stable")[:_WORST_ROWS]
        values = relative[order]
        return tuple(
            WorstRow(int(row), float(value) if np.isfinite(value) else None)
            for row, value in zip(self.rows[order], values, strict=True)
        )


def _decoded_distance(ours: EncodedTensor, theirs: EncodedTensor) -> _Distance:
    a, b = Values(ours), Values(theirs)
    sums = np.zeros(3)
    largest = 0.0
    columns = np.zeros(a.shape[1], bool)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with np.errstate(all="ignore"):
        for window in slices(*a.shape):
            x32, y32 = a.rows(window), b.rows(window)
            # Equal bits are the common case by far, and cost one pass.
            if np.array_equal(x32.view(np.uint32), y32.view(np.uint32)):
                x = x32.astype(np.float64).ravel()
                norm = np.einsum("i,i->", x, x)
                sums += (norm, norm, norm)
                continue
            unequal = ~((x32 == y32) | (np.isnan(x32) & np.isnan(y32)))
            hit = np.flatnonzero(unequal.any(axis=1))
            columns |= unequal.any(axis=0)
            x, y = x32.astype(np.float64), y32.astype(np.float64)
            sums += (np.einsum("ij,ij->", x, x), np.einsum("ij,ij->", y, y), np.einsum("ij,ij->", x, y))
            delta, beside = x[hit] - y[hit], y[hit]
            largest = max(largest, float(np.abs(delta).max(initial=0.0)))
            errors, norms = (np.einsum("ij,ij->i", v, v) for v in (delta, beside))
            parts.append((window.start + hit, errors, norms))
    rows, errors, norms = (
        (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else (np.empty(0, np.int64),) * 3
    )
    aa, bb, ab = sums
    differing = np.flatnonzero(columns)
    if rows.size == 0:  # NaN stands for NaN
        return _Distance(0.0, 1.0, 0.0, rows, differing, errors, norms)
    if not np.isfinite(sums).all():
        return _Distance(None, None, None, rows, differing, errors, norms)
    rel_l2 = float(np.sqrt(errors.sum() / bb)) if bb else None
    cosine = float(ab / np.sqrt(aa * bb)) if aa and bb else None
    return _Distance(rel_l2, cosine, largest, rows, differing, errors, norms)
