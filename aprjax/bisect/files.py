"""The static comparison: do two files hold the same model? Cheapest cause first.

Bytes are compared before values, and values are decoded a few rows at a time, so that files of any
size cost no more memory than a slice of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aprjax.bisect.explain_tensor import explain_difference
from aprjax.checkpoint.mapped_file import release_pages
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor, Finding

# Decoded at once: 2^22 float32 values of each side are 32 MiB.
_ELEMENTS = 1 << 22

# Keys whose difference changes no number of a forward pass.
_INERT_KEYS = ("max_position_embeddings", "architecture")
_DIMENSIONS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that the two files do not hold in the same bytes.

    Attributes:
        name: canonical name.
        block_types: of model and reference; None where the tensor is missing.
        rel_l2: of the decoded values; None where they cannot be compared.
        cosine: likewise.
        rows: how many rows (of a matrix) hold a differing value.
        first_row: the first of them.
        explanation: in words; empty where the values are equal.
    """

    name: str
    block_types: tuple[str | None, str | None]
    rel_l2: float | None
    cosine: float | None
    rows: int
    first_row: int | None
    explanation: str

    @property
    def same_values(self) -> bool:
        """Other bytes, equal decoded values: another encoding of the same numbers."""
        return self.rel_l2 == 0.0


@dataclass(frozen=True)
class FilesReport:
    """What the two files have in common and what not."""

    config: dict[str, tuple[Any, Any]]
    tensors: tuple[TensorDifference, ...]
    compared: int
    identical_bytes: int

    @property
    def dimensions(self) -> dict[str, tuple[Any, Any]]:
        """Differing keys that make the two models incomparable."""
        return {key: pair for key, pair in self.config.items() if key in _DIMENSIONS}

    @property
    def identical(self) -> bool:
        """Byte-identical blocks and equal configs."""
        return not self.config and not self.tensors

    def same_bytes(self, name: str) -> bool:
        """Whether both files hold this tensor in the same bytes."""
        return self.tensor(name) is None

    def sentence(self) -> str:
        """What the files comparison came to, in one sentence."""
        if self.identical:
            return f"The two files hold byte-identical blocks in all {self.compared} tensors, and equal configs."
        parts = [f"{self.identical_bytes} of {self.compared} tensors hold identical bytes"]
        same = sum(t.same_values for t in self.tensors)
        other = len(self.tensors) - same
        if same:
            parts.append(f"{same} hold equal values in another block type")
        if other:
            parts.append(f"{other} differ in value")
        parts.append(f"configs differ in {', '.join(self.config)}" if self.config else "configs are equal")
        return "; ".join(parts) + "."

    def tensor(self, name: str) -> TensorDifference | None:
        """The difference of one tensor, or None."""
        return next((t for t in self.tensors if t.name == name), None)

    def findings(self) -> tuple[Finding, ...]:
        """The differences as findings: errors where a value differs, info where only the encoding does."""
        found = [
            Finding(
                "config-differs",
                "info" if key in _INERT_KEYS else "error",
                f"{key} is {ours!r} in the model and {theirs!r} in the reference",
            )
            for key, (ours, theirs) in self.config.items()
        ]
        same = [t for t in self.tensors if t.same_values]
        if same:
            kinds = sorted({f"{a} for {b}" for t in same for a, b in [t.block_types]})
            found.append(
                Finding(
                    "block-types-differ",
                    "info",
                    f"{len(same)} tensors hold equal values in another block type ({', '.join(kinds)})",
                    tensor=same[0].name if len(same) == 1 else None,
                )
            )
        found += [
            Finding("tensor-differs", "error", t.explanation, tensor=t.name) for t in self.tensors if not t.same_values
        ]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


def compare_files(
    model: Checkpoint, ref: Checkpoint, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> FilesReport:
    """Compares configs and every tensor of two checkpoints.

    A head that one side leaves to be tied is compared as the embedding that stands for it.
    """
    ours, theirs = model.config.to_json(), ref.config.to_json()
    config = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    names = list(dict.fromkeys([*ref.tensors, *model.tensors]))
    differences: list[TensorDifference] = []
    identical = 0
    for index, name in enumerate(names):
        progress(index, len(names))
        pair = _tensor(model, name), _tensor(ref, name)
        difference = _compare(*pair, name, ref)
        for tensor in pair:
            if tensor is not None:
                release_pages(tensor.data)
        if difference is None:
            identical += 1
        else:
            differences.append(difference)
    progress(len(names), len(names))
    return FilesReport(config, tuple(differences), len(names), identical)


def _tensor(checkpoint: Checkpoint, name: str) -> EncodedTensor | None:
    found = checkpoint.tensors.get(name)
    if found is None and name == "lm_head.weight":
        return checkpoint.tensors.get("model.embed_tokens.weight")
    return found


def _compare(
    ours: EncodedTensor | None, theirs: EncodedTensor | None, name: str, ref: Checkpoint
) -> TensorDifference | None:
    if ours is None or theirs is None:
        side, other = ("model", theirs) if ours is None else ("reference", ours)
        types = (ours and ours.block_type, theirs and theirs.block_type)
        shape = list(other.shape) if other is not None else []
        return TensorDifference(name, types, None, None, 0, None, f"missing in the {side} (shape {shape} in the other)")
    types = (ours.block_type, theirs.block_type)
    if ours.shape != theirs.shape:
        text = f"shape {list(ours.shape)} in the model, {list(theirs.shape)} in the reference"
        return TensorDifference(name, types, None, None, 0, None, text)
    same_encoding = ours.block_type == theirs.block_type and ours.row_padded == theirs.row_padded
    if same_encoding and np.array_equal(ours.data, theirs.data):
        return None
    rel_l2, cosine, rows, first = _decoded_distance(ours, theirs)
    text = "" if rel_l2 == 0.0 else explain_difference(ours, theirs, rel_l2=rel_l2, rows=rows, first_row=first, ref=ref)
    return TensorDifference(name, types, rel_l2, cosine, rows, first, text)


def _decoded_distance(ours: EncodedTensor, theirs: EncodedTensor) -> tuple[float | None, float | None, int, int | None]:
    """Relative L2 and cosine of the decoded values, how many rows differ, and the first of them."""
    sums = np.zeros(4)
    differing: list[np.ndarray] = []
    for start, a, b in _decoded_slices(ours, theirs):
        unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        hit = np.flatnonzero(unequal.any(axis=1))
        differing.append(start + hit)
        if hit.size:
            x, y = a.astype(np.float64), b.astype(np.float64)
            delta = x - y
            sums += ((x * x).sum(), (y * y).sum(), (x * y).sum(), (delta * delta).sum())
        else:
            norm = float(np.square(a, dtype=np.float64).sum())
            sums += (norm, norm, norm, 0.0)
    rows = np.concatenate(differing) if differing else np.empty(0, int)
    aa, bb, ab, dd = sums
    first = int(rows[0]) if rows.size else None
    if not np.isfinite(sums).all():
        return None, None, rows.size, first
    if rows.size == 0:
        return 0.0, 1.0, 0, None
    rel_l2 = float(np.sqrt(dd / bb)) if bb else None
    return rel_l2, float(ab / np.sqrt(aa * bb)) if aa and bb else None, int(rows.size), first


def _decoded_slices(ours: EncodedTensor, theirs: EncodedTensor):
    """Matching slices of decoded rows, `(first row, model, reference)`; vectors count as one row."""
    try:
        by_row = all(tensor.packed().size for tensor in (ours, theirs))
        rows = ours.shape[0] if by_row and len(ours.shape) > 1 else 0
    except CheckpointError:  # rows that share blocks (flat AprQ4, AprQ8): decode the whole
        rows = 0
    if rows == 0:
        shape = (-1, ours.shape[-1]) if len(ours.shape) > 1 else (1, -1)
        yield 0, ours.decode().reshape(shape), theirs.decode().reshape(shape)
        return
    step = max(1, _ELEMENTS // max(1, ours.size // rows))
    for start in range(0, rows, step):
        window = slice(start, min(start + step, rows))
        yield start, ours.decode_rows(window), theirs.decode_rows(window)
