"""`Trace`: one side's values by (layer, stage), with all that a comparison must know about them.

A saved trace is a safetensors file: one tensor `layer.3/ffn_gate` per value (`whole/lm_head` outside the
layers), and in its metadata the tokens, positions, arithmetic, capture points and the file's SHA-256. The
writer streams: it holds no more than the value at hand.
"""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage

SCHEMA = "aprjax.trace/1"
# Where in the graph the stages whose name leaves that open are taken.
CAPTURE_POINTS = {
    "qkv_matmul": "before the bias",
    "qkv_bias": "after the bias",
    "q_post_rope": "before the KV heads are repeated",
    "k_post_rope": "before the KV heads are repeated",
    "attn_scores": "scaled, before the mask",
    "attn_softmax": "after the mask",
}
# A header entry takes about 90 bytes; the rest is air for long names and large offsets.
_ENTRY_BYTES = 160
# The format's own limit on the header (safetensors 0.4: 100 MB).
_MOST_HEADER = 100_000_000
# Before the names of values that are no stages.
_EXTRA = "raw/"


@dataclass(frozen=True)
class TraceInfo:
    """What a trace is a trace of.

    Attributes:
        path: the file that was run.
        sha256: its digest.
        format: gguf, apr or safetensors.
        arithmetic: the preset that ran it.
        tokens: what was fed.
        positions: positions of the rows of every stage up to the last residual.
        head_positions: positions of the rows of final_norm and lm_head.
        dtype: of the values.
        platform: what computed them.
        engine: of an engine that was run live: its version, build and options.
    """

    path: str
    sha256: str
    format: str
    arithmetic: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    head_positions: tuple[int, ...]
    dtype: str = "float32"
    platform: str = ""
    engine: Mapping[str, str] = field(default_factory=dict)


def tensor_name(layer: int, stage: Stage) -> str:
    """The name of a value in a saved trace."""
    return f"whole/{stage}" if layer == OUTSIDE else f"layer.{layer}/{stage}"


def in_order(keys: Iterable[tuple[int, Stage]]) -> list[tuple[int, Stage]]:
    """Keys by layer, and in execution order within a layer."""
    rank = {stage: index for index, stage in enumerate(Stage)}
    return sorted(keys, key=lambda key: (key[0], rank[key[1]]))


def this_platform() -> str:
    """What computes here: platform and versions, for a trace's metadata."""
    import jax

    device = jax.devices()[0]
    return f"{platform.machine()} {device.platform} ({device.device_kind}), jax {jax.__version__}"


class TraceWriter:
    """Writes a trace value by value; the file appears under its name when it is complete (`atomic_file`).

    Use it as a context manager. Values may come in batches of rows. It raises CheckpointError where the file cannot be
    written.
    """

    def __init__(self, path: Path, info: TraceInfo, *, layers: int, extra: int = 0) -> None:
        self.path = path
        metadata = {"schema": SCHEMA, "info": json.dumps(asdict(info)), "capture_points": json.dumps(CAPTURE_POINTS)}
        self._header: dict[str, Any] = {"__metadata__": metadata}
        room = len(json.dumps(self._header)) + _ENTRY_BYTES * (len(Stage) * (layers + 1) + extra)
        self._room = min(-(-room // 8) * 8, _MOST_HEADER)
        self._end = 0
        self._written: dict[str, int] = {}
        self._output = ExitStack()
        # Not durable: waiting for gigabytes to reach the disk costs more than making a trace again after a power cut.
        self._stream = self._output.enter_context(atomic_file(path, durable=False))

    def write(self, layer: int, stage: Stage, rows: np.ndarray, *, total_rows: int | None = None) -> None:
        """Appends rows `[position, width]` to a value of `total_rows` rows (by default, these are all)."""
        name = tensor_name(layer, stage)
        rows = np.ascontiguousarray(rows, np.float32)
        total = rows.shape[0] if total_rows is None else total_rows
        if name not in self._header:
            size = total * rows.shape[1] * 4
            shape, offsets = [total, rows.shape[1]], [self._end, self._end + size]
            self._header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            self._written[name] = 0
            self._end += size
        self._stream.seek(8 + self._room + self._header[name]["data_offsets"][0] + self._written[name])
        self._stream.write(rows.data)
        self._written[name] += rows.nbytes

    def write_extra(self, name: str, values: np.ndarray) -> None:
        """Appends an engine's own value under its own name; `extra` of the constructor sets room aside."""
        values = np.ascontiguousarray(values, np.float32)
        name = f"{_EXTRA}{name}"
        offsets = [self._end, self._end + values.nbytes]
        self._header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": offsets}
        self._written[name] = values.nbytes
        self._end += values.nbytes
        self._stream.seek(8 + self._room + offsets[0])
        self._stream.write(values.data)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            with self._output:
                self._finish()
        else:
            self._output.__exit__(kind, error, traceback)

    def _finish(self) -> None:
        for name, written in self._written.items():
            begin, end = self._header[name]["data_offsets"]
            if written != end - begin:
                raise ValueError(f"{name} was declared with {end - begin} bytes and got {written}")
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(f"the header takes {len(text)} bytes, {self._room} were set aside")
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._room) + text.ljust(self._room))


@dataclass(frozen=True)
class Trace:
    """A saved trace, opened lazily."""

    path: Path
    info: TraceInfo
    shapes: Mapping[tuple[int, Stage], tuple[int, int]]
    extra_names: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Opens a saved trace.

        Raises:
            CheckpointError: the file is no trace of aprjax, is damaged, or holds values taken at other
                points of the graph than those of `CAPTURE_POINTS`.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as stream:
                metadata = stream.metadata() or {}
                if metadata.get("schema") != SCHEMA:
                    raise ValueError(f"expected the schema {SCHEMA}, found {metadata.get('schema')!r}")
                info = parse_info(json.loads(metadata["info"]))
                check_capture_points(json.loads(metadata["capture_points"]))
                shapes, extra = {}, []
                for name in stream.keys():  # noqa: SIM118 - not a dict
                    if name.startswith(_EXTRA):
                        extra.append(name.removeprefix(_EXTRA))
                        continue
                    part = stream.get_slice(name)
                    shapes[_key(name)] = _checked_shape(name, part.get_dtype(), part.get_shape(), info)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"not a readable trace: {error}", file=path, fix="save it again with --save-trace"
            ) from error
        return cls(path, info, {key: shapes[key] for key in in_order(shapes)}, tuple(extra))

    @property
    def extra(self) -> Mapping[str, np.ndarray]:
        """An engine's own values by its own names, read when they are asked for."""
        return _Extra(self)

    def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
        """One value, `float32[position, width]`; KeyError where it was not captured."""
        if key not in self.shapes:
            raise KeyError(key)
        return self._read(tensor_name(*key))

    def rows(self, key: tuple[int, Stage], lines: slice) -> np.ndarray:
        """Some rows of a value; the others are not read. KeyError where it was not captured."""
        if key not in self.shapes:
            raise KeyError(key)
        return self._read(tensor_name(*key), slice(*lines.indices(self.shapes[key][0])))

    def _read(self, name: str, lines: slice | None = None) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as stream:
                return stream.get_tensor(name) if lines is None else stream.get_slice(name)[lines]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the trace changed while it was read: {error}", file=self.path, tensor=name, fix="save it again"
            ) from error

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Extra(Mapping[str, np.ndarray]):
    """The values of a saved trace that are no stages."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._trace.extra_names:
            raise KeyError(name)
        return self._trace._read(f"{_EXTRA}{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._trace.extra_names)

    def __len__(self) -> int:
        return len(self._trace.extra_names)


def _key(name: str) -> tuple[int, Stage]:
    where, _, stage = name.partition("/")
    return OUTSIDE if where == "whole" else int(where.removeprefix("layer.")), Stage(stage)


def parse_info(document: Mapping[str, Any]) -> TraceInfo:
    """A `TraceInfo` from what `asdict` makes of one.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    info = dict(document)
    for key in ("tokens", "positions", "head_positions"):
        info[key] = tuple(info[key])
        if not all(type(number) is int and number >= 0 for number in info[key]):
            raise ValueError(f"{key} are expected to be whole numbers from 0")
    if max((*info["positions"], *info["head_positions"]), default=-1) >= len(info["tokens"]):
        raise ValueError(f"positions lie beyond its {len(info['tokens'])} tokens")
    named = {key: info[key] for key in ("path", "sha256", "format", "arithmetic")}
    for key, text in (named | info.get("engine", {})).items():
        if type(text) is not str:
            raise ValueError(f"{key} is expected as text, found {text!r:.40}")
    return TraceInfo(**info)


def check_capture_points(found: Mapping[str, str]) -> None:
    """Checks that values were taken where ours are; taken elsewhere they are not comparable, whatever their names.

    Raises:
        ValueError: naming the first stage that was taken elsewhere.
    """
    for stage, point in CAPTURE_POINTS.items():
        if found.get(stage) != point:
            raise ValueError(f"{stage} is expected as captured {point!r}, found {found.get(stage)!r}")


def _checked_shape(name: str, dtype: str, shape: list[int], info: TraceInfo) -> tuple[int, int]:
    key = _key(name)
    rows = len(info.head_positions if key[1] in (Stage.FINAL_NORM, Stage.LM_HEAD) else info.positions)
    if dtype != "F32" or len(shape) != 2 or shape[0] != rows:
        raise ValueError(f"{name} is expected as F32 with {rows} rows, found {dtype} of shape {shape}")
    return shape[0], shape[1]
