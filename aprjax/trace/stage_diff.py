"""`apr-stage-diff-v1` (contracts.md section 2.4): two stage files compared element by element, in upstream's words.

The arithmetic is upstream's (`diff_05_aprt_stage.rs`): differences in float32, sums in float64 from the first element
to the last, the cosine of an all-zero vector 0, the largest differences first, and of equal ones the earlier element.
So the document that is printed is theirs, byte for byte. NaN differences are left out of the maximum, as theirs are;
where they stand among the largest is not defined there.

Nothing in such a document fails: the reader judges. Of whole folders ours also says what is not there.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.aprt import HEADER, MAGIC, WHOLE_MODEL, header_layer, raw_files, read_stage_file
from aprjax.trace.memory import AnyTrace
from aprjax.trace.serde import serde_pretty

SCHEMA = "apr-stage-diff-v1"
FOLDERS_SCHEMA = "aprjax.stage-diff-folders/1"
# `apr diff --limit`'s own.
LIMIT = 10


@dataclass(frozen=True)
class StageDiff:
    """Two stages compared.

    Attributes:
        path_a: of the first file.
        path_b: of the second.
        layer: of both; `WHOLE_MODEL` outside the layers.
        count: elements of each.
        max_abs: the largest difference; NaN differences are none, as upstream has it.
        max_index: where it is.
        rms: of the differences; NaN with any NaN.
        cosine: of the two vectors.
        top: the largest differences: index, both values, difference.
    """

    path_a: str
    path_b: str
    layer: int
    count: int
    max_abs: float
    max_index: int
    rms: float
    cosine: float
    top: tuple[tuple[int, float, float, float], ...]

    @property
    def identical(self) -> bool:
        """Whether every element is equal."""
        return self.rms == 0

    def to_json(self) -> dict[str, Any]:
        """Upstream's document: its keys, in its order; a number that is none is null, as serde writes it."""
        return {
            "schema": SCHEMA,
            "path_a": self.path_a,
            "path_b": self.path_b,
            "layer": "whole-model" if self.layer == WHOLE_MODEL else self.layer,
            "dim_product": self.count,
            "max_abs_diff": _number(self.max_abs),
            "max_abs_diff_index": self.max_index,
            "rms_diff": _number(self.rms),
            "cosine_sim": _number(self.cosine),
            "top_diffs": [
                {"index": index, "a": _number(a), "b": _number(b), "abs_diff": _number(difference)}
                for index, a, b, difference in self.top
            ],
        }

    def to_text(self) -> str:
        """The document as `apr diff --values --json` prints it."""
        return serde_pretty(self.to_json()) + "\n"


def diff_values(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, paths: tuple[str, str], layer: int, limit: int = LIMIT
) -> StageDiff:
    """Compares two vectors of float32 as upstream does.

    Raises:
        ValueError: they differ in length.
    """
    a, b = np.asarray(a, np.float32).reshape(-1), np.asarray(b, np.float32).reshape(-1)
    if a.size != b.size:
        raise ValueError(f"{a.size} elements against {b.size}: stages of different sizes cannot be compared")
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
        wide_a, wide_b, wide = a.astype(np.float64), b.astype(np.float64), difference.astype(np.float64)
        squares_a, squares_b = _sum(wide_a * wide_a), _sum(wide_b * wide_b)
        known_norms = squares_a > 0 and squares_b > 0
        cosine = _sum(wide_a * wide_b) / (math.sqrt(squares_a) * math.sqrt(squares_b)) if known_norms else 0.0
        rms = float(np.float32(np.sqrt(_sum(wide * wide) / a.size))) if a.size else 0.0
    known = np.where(np.isnan(difference), np.float32(0), difference)
    at = int(known.argmax()) if a.size else 0
    order = np.argsort(-known, kind="stable")[: max(limit, 1)]
    top = tuple((int(i), float(a[i]), float(b[i]), float(difference[i])) for i in order)
    return StageDiff(*paths, layer, a.size, float(known[at]) if a.size else 0.0, at, rms, cosine, top)


def _sum(values: np.ndarray) -> float:
    """The sum from the first element to the last, as a loop adds; `numpy.sum` adds in another order."""
    return float(np.add.accumulate(values)[-1]) if values.size else 0.0


def diff_files(first: Path, second: Path, *, limit: int = LIMIT) -> StageDiff:
    """Compares two APRT files.

    Raises:
        CheckpointError: one is damaged, or they are of different layers or sizes, which upstream refuses, too.
    """
    layer, other = (_layer(path) for path in (first, second))
    if layer != other:
        raise CheckpointError(
            f"layer {_label(layer)} against layer {_label(other)} of {second}",
            file=first,
            fix="give the same layer of both sides",
        )
    a, b = read_stage_file(first, layer), read_stage_file(second, layer)
    if a.size != b.size:
        raise CheckpointError(
            f"{a.size} elements, and {second} has {b.size}: other tokens, another selection of them or another model",
            file=first,
            fix="trace both sides on the same tokens",
        )
    return diff_values(a, b, paths=(str(first), str(second)), layer=layer, limit=limit)


@dataclass(frozen=True)
class FoldersDiff:
    """Two folders of stages compared.

    Attributes:
        folder_a: the first.
        folder_b: the second.
        diffs: of every stage that both have in one size, in execution order.
        unmeasured: of every other stage, why it was not compared.
    """

    folder_a: str
    folder_b: str
    diffs: tuple[StageDiff, ...]
    unmeasured: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 where everything is there and equal, 1 where something differs, 3 where something is not there."""
        if any(not diff.identical for diff in self.diffs):
            return 1
        return 3 if self.unmeasured or not self.diffs else 0

    def to_json(self) -> dict[str, Any]:
        """Upstream's documents in a list, and what was not measured."""
        return {
            "schema": FOLDERS_SCHEMA,
            "folder_a": self.folder_a,
            "folder_b": self.folder_b,
            "diffs": [diff.to_json() for diff in self.diffs],
            "unmeasured": dict(self.unmeasured),
        }

    def to_frame(self) -> Any:
        """A row per stage as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([{k: v for k, v in d.to_json().items() if k != "top_diffs"} for d in self.diffs])

    def top(self, k: int = 10) -> list[StageDiff]:
        """The k stages with the smallest cosine."""
        return sorted(self.diffs, key=lambda diff: diff.cosine)[:k]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(d.path_a)}</td><td>{d.count}</td><td>{d.max_abs:.3e}</td><td>{d.cosine:.8f}</td></tr>"
            for d in self.diffs
        )
        missing = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in self.unmeasured.items())
        return f"<table>{rows}</table><p>unmeasured:</p><ul>{missing}</ul>" if missing else f"<table>{rows}</table>"


def diff_folders(first: Path, second: Path, *, limit: int = LIMIT) -> FoldersDiff:
    """Compares every stage of two APRT folders.

    Raises:
        CheckpointError: a folder has no stage, or a damaged one.
    """
    ours, theirs = raw_files(first).files, raw_files(second).files
    diffs, unmeasured = [], {}
    rank = {stage: number for number, stage in enumerate(Stage)}
    # The embedding comes first, final_norm and lm_head last.
    order = sorted(
        set(ours) | set(theirs),
        key=lambda key: (key[0] if key[0] != OUTSIDE or key[1] is Stage.EMBEDDING else WHOLE_MODEL, rank[key[1]]),
    )
    for key in order:
        name = _name(key)
        if key not in ours or key not in theirs:
            missing = first if key not in ours else second
            unmeasured[name] = f"it is not in {missing}"
            continue
        files = [(first, ours[key]), (second, theirs[key])]
        values = [read_stage_file(folder / file, header_layer(file)) for folder, file in files]
        if values[0].size != values[1].size:
            unmeasured[name] = f"{values[0].size} elements against {values[1].size}"
            continue
        paths = str(first / ours[key]), str(second / theirs[key])
        diffs.append(diff_values(values[0], values[1], paths=paths, layer=_upstream_layer(key), limit=limit))
    return FoldersDiff(str(first), str(second), tuple(diffs), unmeasured)


def diff_traces(first: AnyTrace, second: AnyTrace, *, limit: int = LIMIT) -> FoldersDiff:
    """Compares every stage of two traces of the same tokens and positions, as if they were folders.

    Raises:
        CheckpointError: they are of other tokens or positions: element by element they are not the same thing.
    """
    for what in ("tokens", "positions", "head_positions"):
        ours, theirs = getattr(first.info, what), getattr(second.info, what)
        if ours != theirs:
            raise CheckpointError(
                f"{what} differ: {list(ours)[:8]} against {list(theirs)[:8]}", fix="trace both sides on the same tokens"
            )
    present = set(second)
    diffs, unmeasured = [], {_name(key): "it is not in the first" for key in second if key not in set(first)}
    for key in first:
        if key not in present:
            unmeasured[_name(key)] = "it is not in the second"
            continue
        layer = _upstream_layer(key)
        name = f"layer-{layer}/{key[1]}.bin" if layer != WHOLE_MODEL else f"{key[1]}.bin"
        paths = f"{first.info.path}/{name}", f"{second.info.path}/{name}"
        diffs.append(diff_values(first[key], second[key], paths=paths, layer=layer, limit=limit))
    return FoldersDiff(first.info.path, second.info.path, tuple(diffs), unmeasured)


def parse_stage_diff(document: Any) -> StageDiff:
    """Upstream's document, read.

    Raises:
        ValueError: it is none.
    """
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}, found {document['schema']!r:.80}")
        layer = WHOLE_MODEL if document["layer"] == "whole-model" else document["layer"]
        numbers = [document[key] for key in ("max_abs_diff", "rms_diff", "cosine_sim")]
        rows = [(row["index"], row["a"], row["b"], row["abs_diff"]) for row in document["top_diffs"]]
        whole = [layer, document["dim_product"], document["max_abs_diff_index"], *(row[0] for row in rows)]
        reals = [*numbers, *(value for row in rows for value in row[1:])]
        if not all(type(value) is int and value >= 0 for value in whole):
            raise ValueError("layer, counts and indices are expected as whole numbers from 0")
        if not all(
            value is None or (isinstance(value, float | int) and not isinstance(value, bool)) for value in reals
        ):
            raise ValueError("differences are expected as numbers or null")
    except (KeyError, TypeError) as error:
        raise ValueError(f"no stage diff: {error}") from error
    largest, rms, cosine = (_read_number(value) for value in numbers)
    top = tuple((row[0], _read_number(row[1]), _read_number(row[2]), _read_number(row[3])) for row in rows)
    paths = str(document["path_a"]), str(document["path_b"])
    return StageDiff(*paths, layer, document["dim_product"], largest, document["max_abs_diff_index"], rms, cosine, top)


def _name(key: tuple[int, Stage]) -> str:
    return f"layer {key[0]} {key[1]}" if key[0] != OUTSIDE else str(key[1])


def _upstream_layer(key: tuple[int, Stage]) -> int:
    """The layer in upstream's header of a stage: the embedding is one of layer 0's."""
    return WHOLE_MODEL if key[0] == OUTSIDE and key[1] is not Stage.EMBEDDING else max(key[0], 0)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _label(layer: int) -> str:
    return "whole-model" if layer == WHOLE_MODEL else str(layer)


def _layer(path: Path) -> int:
    """The layer that a file's header names, whatever folder it lies in.

    Raises:
        CheckpointError: it is no APRT file.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path, fix="check the path") from error
    if len(head) < HEADER.size or head[:4] != MAGIC:
        raise CheckpointError(
            f"expected the magic {MAGIC!r}, found {head[:4]!r}", file=path, offset=0, fix="give a file of a stage"
        )
    return HEADER.unpack(head)[1]
