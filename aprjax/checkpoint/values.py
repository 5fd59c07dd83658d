"""What the numbers in a checkpoint say: NaN, infinities, zeros, dead rows (apr-format.md 7).

Opening a file decodes nothing; this decodes all of it, some rows at a time, and applies the gates of `apr validate` and
of realizar's loader. Where these two differ, the message says which of them refuses the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from aprjax.blocks import block_format
from aprjax.checkpoint.types import Checkpoint, EncodedTensor, Finding

# Elements decoded at a time: 16 MiB of float32.
_CHUNK_ELEMENTS = 1 << 22
# Gates of `apr validate` (F-DATA-QUALITY-001, -003, -007) and realizar's load (PMAT-187, PMAT-325): apr-format.md 7.
ZERO_SHARE_EMBEDDING = 0.5
ZERO_SHARE_OTHER = 0.8
LEAST_NORM = 1e-6
LEAST_RANGE = 1e-10
DEAD_ROW_SHARE_REALIZAR = 0.25
GREATEST_MEAN = 100.0
# Weights of trained models stay far below this; bytes of another type taken as floats do not. Qwen2.5's largest, its
# k biases, reach some hundreds.
ABSURD_MAGNITUDE = 1e4
# Ratio of the 99th to the 10th percentile of |x|: 20.5 for any normal distribution. BF16 bits taken as F16 (#1601)
# squeeze eight octaves into one, which leaves less than 4 of it.
_SQUEEZED_RATIO = 4.0
_SAMPLE_ELEMENTS = 1 << 16
_SAMPLE_LEAST = 64
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass
class TensorStatistics:
    """Running statistics of one tensor.

    Attributes:
        elements: values seen.
        zeros: of these, zeros.
        not_finite: of these, NaN or infinite.
        first_not_finite: flat index of the first such value.
        total: sum of the finite values.
        squares: sum of their squares.
        smallest: of the finite values.
        largest: of the finite values.
        dead_rows: rows whose L2 norm is below `LEAST_NORM` (embedding and head only).
        last_live_row: number of the last row that is not dead.
    """

    elements: int = 0
    zeros: int = 0
    not_finite: int = 0
    first_not_finite: int | None = None
    total: float = 0.0
    squares: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf
    dead_rows: int = 0
    last_live_row: int = -1

    def add(self, values: np.ndarray, first_row: int, *, rows: bool) -> None:
        """Take in `float32[rows, width]`, the first of which is row `first_row` of the tensor."""
        finite = np.isfinite(values)
        if not finite.all():
            bad = np.flatnonzero(~finite.reshape(-1))
            if self.first_not_finite is None:
                self.first_not_finite = self.elements + int(bad[0])
            self.not_finite += bad.size
            self.zeros -= bad.size
            values = np.where(finite, values, 0)
        self.elements += values.size
        self.zeros += int(values.size - np.count_nonzero(values))
        if values.size:
            self.smallest = min(self.smallest, float(values.min()))
            self.largest = max(self.largest, float(values.max()))
        self.total += float(values.sum(dtype=np.float64))
        squares = np.einsum("rw,rw->r", values, values, dtype=np.float64)
        self.squares += float(squares.sum())
        if rows:
            live = np.flatnonzero(squares >= LEAST_NORM**2)
            self.dead_rows += squares.size - live.size
            if live.size:
                self.last_live_row = first_row + int(live[-1])


def scan_values(
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Finding, ...]:
    """Decode tensors and report values that no sound model has.

    Args:
        checkpoint: opened.
        names: canonical names of the tensors to scan; all of them by default.
        progress: called with the number of encoded bytes done since its last call.

    Returns:
        Findings `values-not-finite`, `values-all-zero`, `values-mostly-zero`, `values-constant`, `values-absurd`,
        `values-bf16-as-f16`, `values-dead-rows`, `values-padding-rows`, in the order of the tensors.
    """
    findings: list[Finding] = []
    for name in checkpoint.tensors if names is None else names:
        tensor = checkpoint.tensors[name]
        findings += tensor_findings(tensor)
        if progress is not None:
            progress(tensor.nbytes)
    return tuple(findings)


def tensor_findings(tensor: EncodedTensor) -> Iterator[Finding]:
    """What one tensor's values say; see `scan_values`."""
    statistics = tensor_statistics(tensor)
    if not statistics.elements:
        return
    name = tensor.name
    if statistics.not_finite:
        place = _index_of(statistics.first_not_finite or 0, tensor.shape)
        yield Finding(
            "values-not-finite",
            "error",
            f"{statistics.not_finite} of {statistics.elements} values are NaN or infinite, the first at {place}; `apr "
            "validate` and realizar refuse the file",
            tensor=name,
            offset=tensor.offset,
            reference="F-DATA-QUALITY-002, F-ROSETTA-FP-001, PMAT-187",
        )
    if statistics.not_finite == statistics.elements:
        return
    if statistics.zeros == statistics.elements - statistics.not_finite:
        yield Finding(
            "values-all-zero",
            "error",
            "all values that are numbers are zero; `apr validate` refuses the file",
            tensor=name,
            offset=tensor.offset,
            reference="F-DATA-QUALITY-001, GH-88, PMAT-234",
        )
        return
    yield from _shape_of_distribution(tensor, statistics)
    if tensor.block_type == "F16" and len(tensor.shape) > 1 and _looks_like_bf16(tensor):
        yield Finding(
            "values-bf16-as-f16",
            "error",
            "labelled F16, but only as BF16 do the bytes have the spread of weights; all readers compute with the "
            "wrong numbers",
            tensor=name,
            offset=tensor.offset,
            reference="#1601",
        )
    if statistics.dead_rows:
        yield _dead_rows(tensor, statistics)


def tensor_statistics(tensor: EncodedTensor) -> TensorStatistics:
    """Statistics of a tensor's values, decoded some rows at a time."""
    statistics = TensorStatistics()
    rows = tensor.name in _TABLES and len(tensor.shape) == 2
    first = 0
    for values in _decoded(tensor):
        statistics.add(values, first, rows=rows)
        first += len(values)
    return statistics


def _index_of(flat: int, shape: tuple[int, ...]) -> list[int]:
    """Row-major index of the element with that flat number."""
    index: list[int] = []
    for extent in reversed(shape):
        flat, position = divmod(flat, extent)
        index.insert(0, position)
    return index


def _decoded(tensor: EncodedTensor) -> Iterator[np.ndarray]:
    """The values as `float32[rows, width]` pieces; of flat types whose rows begin inside blocks, all at once."""
    width = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else tensor.size
    if not tensor.size:
        return
    blocks = block_format(tensor.block_type)
    by_rows = len(tensor.shape) > 1 and not blocks.tensor_scale
    if not by_rows or (width % blocks.block_size and not tensor.row_padded) or tensor.size <= _CHUNK_ELEMENTS:
        yield tensor.decode().reshape(-1, width)
        return
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, tensor.size // width, step):
        yield tensor.decode_rows(slice(start, start + step)).reshape(-1, width)


def _shape_of_distribution(tensor: EncodedTensor, statistics: TensorStatistics) -> Iterator[Finding]:
    name, elements = tensor.name, statistics.elements
    share = statistics.zeros / elements
    limit = ZERO_SHARE_EMBEDDING if name in _TABLES else ZERO_SHARE_OTHER
    if share > limit:
        yield Finding(
            "values-mostly-zero",
            "error",
            f"{share:.1%} of the values are zero, more than the {limit:.0%} that `apr validate` and realizar allow "
            "here",
            tensor=name,
            offset=tensor.offset,
            reference="F-DATA-QUALITY-001, PMAT-234",
        )
    vector = len(tensor.shape) < 2
    spread = statistics.largest - statistics.smallest
    if math.sqrt(statistics.squares) < LEAST_NORM or (spread < LEAST_RANGE and not vector):
        yield Finding(
            "values-constant",
            "error",
            f"all values lie between {statistics.smallest:g} and {statistics.largest:g}; `apr validate` refuses the "
            "file",
            tensor=name,
            offset=tensor.offset,
            reference="F-DATA-QUALITY-003",
        )
    mean = statistics.total / elements
    greatest = max(abs(statistics.smallest), abs(statistics.largest))
    if greatest > ABSURD_MAGNITUDE or abs(mean) > GREATEST_MEAN:
        refuses = " realizar refuses the file" if abs(mean) > GREATEST_MEAN else ""
        yield Finding(
            "values-absurd",
            "error",
            f"values reach {greatest:g} with mean {mean:g}: the bytes are probably of another type than "
            f"{tensor.block_type}.{refuses}",
            tensor=name,
            offset=tensor.offset,
            reference="PMAT-187, #1601",
        )


def _looks_like_bf16(tensor: EncodedTensor) -> bool:
    bits = tensor.data[: 2 * _SAMPLE_ELEMENTS].view("<u2")
    as_f16 = bits.view("<f2").astype(np.float32)
    as_bf16 = (bits.astype("<u4") << 16).view("<f4")
    return _spread(as_f16) < _SQUEEZED_RATIO < _spread(as_bf16)


def _spread(values: np.ndarray) -> float:
    """Ratio of the 99th to the 10th percentile of the magnitudes; NaN where there is nothing to say."""
    magnitudes = np.abs(values[np.isfinite(values) & (values != 0)])
    if magnitudes.size < max(_SAMPLE_LEAST, values.size // 2):
        return math.nan
    low, high = np.quantile(magnitudes, [0.1, 0.99])
    return float(high) / float(low)


def _dead_rows(tensor: EncodedTensor, statistics: TensorStatistics) -> Finding:
    """Rows of zeros at the end pad the vocabulary and harm nobody; in between they are tokens without meaning."""
    rows = tensor.shape[0]
    padding = rows - 1 - statistics.last_live_row
    inside = statistics.dead_rows - padding
    share = statistics.dead_rows / rows
    realizar = f"; realizar as well, above {DEAD_ROW_SHARE_REALIZAR:.0%}" if share > DEAD_ROW_SHARE_REALIZAR else ""
    if inside == 0:
        message = f"the last {padding} of {rows} rows are zero, as padding of the vocabulary"
        identity, severity = "values-padding-rows", "info"
    else:
        message = f"{statistics.dead_rows} of {rows} rows are zero, {inside} of them before the last row in use"
        identity, severity = "values-dead-rows", "warning"
    return Finding(
        identity,
        severity,
        f"{message}. `apr validate` refuses any such row (the model may be fine){realizar}",
        tensor=tensor.name,
        offset=tensor.offset,
        reference="F-DATA-QUALITY-007, PMAT-325",
    )
