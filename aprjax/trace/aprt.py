"""Reading APRT folders, as `apr trace --save-tensor` writes them (apr-cli-trace-save-tensor-v1).

A file is `layer-<N>/<stage>.bin`, or `<stage>.bin` for final_norm and lm_head: b"APRT", the layer (u32,
0xFFFFFFFF outside), the number of elements (u32), then float32, all little-endian. The embedding lies in
a layer's folder, too: upstream counts it among the stages of a layer. Neither shape nor positions, tokens,
model or capture point are in it, so aprjax writes a sidecar, `_aprjax.json`, and compares without one only
what a given model and prompt leave no doubt about.

Scores and probabilities lie head by head, `[head, query, key]`; all else position by position. Upstream's
oracle script has post-rope queries and keys head by head as well, which its `_PROVENANCE.txt` gives away.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.types import CheckpointError, ModelConfig
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.provenance import NAME as PROVENANCE
from aprjax.trace.provenance import parse_provenance, read_provenance
from aprjax.trace.trace import TraceInfo, check_capture_points, in_order, parse_info

SIDECAR = "_aprjax.json"
SCHEMA = "aprjax.aprt/1"
MAGIC = b"APRT"
HEADER = struct.Struct("<4sII")
WHOLE_MODEL = 0xFFFFFFFF
_OUTSIDE_STAGES = (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)
HEAD_STAGES = (Stage.FINAL_NORM, Stage.LM_HEAD)
ATTENTION_MAPS = (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)
_BY_HEADS = (Stage.Q_POST_ROPE, Stage.K_POST_ROPE, *ATTENTION_MAPS)
_ALIASES = {"layer_output": Stage.POST_FFN_RESIDUAL}
# A sidecar has some hundred entries: more is some other file.
_MOST_SIDECAR = 1 << 26
_FIX = "write the folder again with `python -m aprjax trace SIDE --save DIR`"


def is_aprt_folder(folder: Path) -> bool:
    """Whether a folder holds what `apr trace --save-tensor` or `write_aprt` leaves behind."""
    if (folder / SIDECAR).is_file():
        return True
    candidates = [*folder.glob("*.bin"), *folder.glob("layer-*/*.bin")]
    return any(path.stem in _stage_names() for path in candidates)


@dataclass(frozen=True)
class AprtTrace:
    """An APRT folder, opened lazily; each file's SHA-256 is checked, where it is known, when it is read.

    Attributes:
        folder: the folder.
        info: what it is a trace of.
        entries: by (layer, stage): shape in the file, rows to take, and the digest of the file or None.
        unvouched: files that are there and cannot be compared, with the reason.
    """

    folder: Path
    info: TraceInfo
    entries: Mapping[tuple[int, Stage], _Entry]
    unvouched: Mapping[str, str]

    @property
    def extra(self) -> Mapping[str, np.ndarray]:
        """Nothing: the format has stages only."""
        return {}

    @property
    def vouched(self) -> bool:
        """Whether a sidecar says what the values are; else shapes and positions were taken from a config and tokens."""
        return all(entry.sha256 is not None for entry in self.entries.values()) and bool(self.entries)

    def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
        """One value, `float32[position, width]`; KeyError where it is not there or not vouched for."""
        entry = self.entries[key]
        path = self.folder / entry.file
        values = read_stage_file(path, header_layer(entry.file))
        if entry.sha256 is not None and _digest(path) != entry.sha256:
            raise CheckpointError(f"the file is not the one that {SIDECAR} vouches for", file=path, fix=_FIX)
        if values.size != entry.shape[0] * entry.shape[1]:
            raise CheckpointError(
                f"expected {entry.shape[0]} x {entry.shape[1]} elements, found {values.size}", file=path, fix=_FIX
            )
        return by_position(values, entry.shape, entry.heads)[list(entry.rows)]

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class _Entry:
    file: str
    shape: tuple[int, int]
    positions: tuple[int, ...]
    sha256: str | None
    rows: tuple[int, ...] = ()
    # How many heads lie one after the other; None where the file goes by positions.
    heads: int | None = None


def open_aprt(folder: str | Path, *, config: ModelConfig | None = None, tokens: list[int] | None = None) -> AprtTrace:
    """Opens an APRT folder.

    Args:
        folder: the folder.
        config: of the model that was run; needed where there is no sidecar.
        tokens: what it was fed; needed where neither a sidecar nor a provenance says so.

    Raises:
        CheckpointError: a file is damaged, the sidecar contradicts the files, or there is no sidecar and
            no config and tokens are given.
    """
    folder = Path(folder)
    found = _files(folder)
    if (folder / SIDECAR).is_file():
        return _with_sidecar(folder, found)
    told = parse_provenance(read_provenance(folder))
    if tokens is not None and told.tokens is not None and tuple(tokens) != told.tokens:
        raise CheckpointError(
            f"{PROVENANCE} says that the tokens {list(told.tokens)} were fed, and {tokens} are given",
            file=folder,
            fix="leave the tokens out",
        )
    known = told.tokens if tokens is None else tuple(tokens)
    if config is None or known is None:
        raise CheckpointError(
            f"the folder has no {SIDECAR}: APRT files say neither their tokens nor their shapes and positions",
            file=folder,
            fix="vouch for them: `python -m aprjax trace DIR --file CHECKPOINT --tokens IDS --save FILE.safetensors`",
        )
    return _without_sidecar(folder, found, config, known, by_heads=told.by_heads)


@dataclass(frozen=True)
class RawFiles(Mapping[tuple[int, Stage], np.ndarray]):
    """The bare numbers of a folder by (layer, stage), `float32[elements]`: without shape, tokens and positions.

    What `open_aprt` refuses to compare is here, too: nothing vouches for what it is.
    """

    folder: Path
    files: Mapping[tuple[int, Stage], str]

    def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
        return read_stage_file(self.folder / self.files[key], header_layer(self.files[key]))

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        return iter(in_order(self.files))

    def __len__(self) -> int:
        return len(self.files)


def raw_files(folder: str | Path) -> RawFiles:
    """Lists an APRT folder's files; a sidecar is not looked at.

    Raises:
        CheckpointError: a header is damaged, or there is no file.
    """
    folder = Path(folder)
    return RawFiles(folder, {key: file for key, (file, _) in _files(folder).items()})


def _stage_names() -> dict[str, Stage]:
    return {**_ALIASES, **{str(stage): stage for stage in Stage}}


def _files(folder: Path) -> dict[tuple[int, Stage], tuple[str, int]]:
    """By (layer, stage): the file's path in the folder, and its number of elements. Headers are checked.

    Raises:
        CheckpointError: a header is damaged, or there is no file.
    """
    found: dict[tuple[int, Stage], tuple[str, int]] = {}
    try:
        paths = sorted([*folder.glob("*.bin"), *folder.glob("layer-*/*.bin")])
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}", file=folder, fix="check the path") from error
    for path in paths:
        match = re.fullmatch(r"layer-(0|[1-9]\d{0,5})", path.parent.name) if path.parent != folder else None
        layer = OUTSIDE if path.parent == folder else int(match[1]) if match else None
        stage = _stage_names().get(path.stem)
        if stage is Stage.EMBEDDING and layer is not None:
            # Upstream writes it into a layer's folder; aprjax did not, at first.
            layer = OUTSIDE
        if stage is None or layer is None or (layer == OUTSIDE) != (stage in _OUTSIDE_STAGES):
            raise CheckpointError(
                f"expected one of the 20 stages at its place, found {path.relative_to(folder).as_posix()}",
                file=path,
                fix="a stage of a layer lies in layer-<N>/; final_norm and lm_head beside those folders",
            )
        file = path.relative_to(folder).as_posix()
        count = _read_header(path, header_layer(file))
        if (layer, stage) in found and (path.stem in _ALIASES or stage is Stage.EMBEDDING):
            continue
        found[layer, stage] = file, count
    if not found:
        raise CheckpointError("no APRT file lies in this folder", file=folder, fix="give the folder that was written")
    return found


def header_layer(file: str) -> int:
    """The layer that a file's header must name, from its path in the folder."""
    folder, _, _ = file.rpartition("/")
    return int(folder.removeprefix("layer-")) if folder else WHOLE_MODEL


def by_position(values: np.ndarray, shape: tuple[int, int], heads: int | None) -> np.ndarray:
    """Values as they lie in a file, as `[position, width]`."""
    if heads is None:
        return values.reshape(shape)
    return values.reshape(heads, shape[0], -1).transpose(1, 0, 2).reshape(shape)


def _read_header(path: Path, wanted: int) -> int:
    """The number of elements; `wanted` is the layer that must be named.

    Raises:
        CheckpointError: the header or the size is not what it should be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path, fix=_FIX) from error
    if len(head) < HEADER.size or head[:4] != MAGIC:
        raise CheckpointError(f"expected the magic {MAGIC!r}, found {head[:4]!r}", file=path, offset=0, fix=_FIX)
    _, told, count = HEADER.unpack(head)
    if told != wanted:
        raise CheckpointError(f"expected layer {wanted} from the path, found {told}", file=path, offset=4, fix=_FIX)
    if size != HEADER.size + 4 * count:
        raise CheckpointError(
            f"{count} elements take {HEADER.size + 4 * count} bytes, the file has {size}",
            file=path,
            offset=8,
            fix="the file is cut off, or was still being written",
        )
    return count


def read_stage_file(path: Path, layer: int) -> np.ndarray:
    """The values of a file whose header names this layer, `float32[element]`.

    Raises:
        CheckpointError: the file is damaged, or of another layer.
    """
    count = _read_header(path, layer)
    values = np.fromfile(path, "<f4", count, offset=HEADER.size)
    if values.size != count:
        raise CheckpointError(f"expected {count} elements, read {values.size}", file=path, fix=_FIX)
    return values.astype(np.float32, copy=False)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _with_sidecar(folder: Path, found: Mapping[tuple[int, Stage], tuple[str, int]]) -> AprtTrace:
    path = folder / SIDECAR
    try:
        if path.stat().st_size > _MOST_SIDECAR:
            raise ValueError("it is too large to be a sidecar")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema") != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}, found {document.get('schema')!r}")
        info = parse_info(document["info"])
        check_capture_points(document["capture_points"])
        vouched = {}
        for entry in document["files"]:
            key = int(entry["layer"]), Stage(entry["stage"])
            vouched[key] = _vouched(key, entry, info, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a readable sidecar: {error}", file=path, fix=_FIX) from error
    unvouched = {file: f"{SIDECAR} does not name it" for key, (file, _) in found.items() if key not in vouched}
    return _assemble(folder, info, vouched, unvouched)


def _vouched(
    key: tuple[int, Stage],
    entry: Mapping[str, Any],
    info: TraceInfo,
    found: Mapping[tuple[int, Stage], tuple[str, int]],
) -> _Entry:
    """Raises ValueError where the sidecar contradicts the files or itself."""
    label = f"layer {key[0]} {key[1]}"
    if key not in found:
        raise ValueError(f"{label} is named, and its file is missing")
    file, count = found[key]
    rows, width = (int(number) for number in entry["shape"])
    positions = tuple(int(number) for number in entry["positions"])
    if rows < 1 or width < 1 or rows * width != count or len(positions) != rows:
        raise ValueError(f"{label} is said to be {rows} x {width} at {len(positions)} positions, and has {count}")
    if key[1] not in HEAD_STAGES and positions != info.positions:
        raise ValueError(f"{label} has other positions than the trace")
    if any(not 0 <= position < len(info.tokens) for position in positions) or len(set(positions)) != rows:
        raise ValueError(f"{label} has positions beyond the {len(info.tokens)} tokens, or twice")
    digest = entry["sha256"]
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{label} has no SHA-256")
    heads = entry.get("heads")
    if heads is not None and (type(heads) is not int or heads < 1 or width % heads):
        raise ValueError(f"{label} has {heads!r:.40} heads, which do not share a width of {width}")
    return _Entry(file, (rows, width), positions, digest, heads=heads)


def _without_sidecar(
    folder: Path,
    found: Mapping[tuple[int, Stage], tuple[str, int]],
    config: ModelConfig,
    tokens: tuple[int, ...],
    *,
    by_heads: bool,
) -> AprtTrace:
    everyone = tuple(range(len(tokens)))
    info = TraceInfo(str(folder), "", "aprt", "unknown", tokens, everyone, everyone)
    entries: dict[tuple[int, Stage], _Entry] = {}
    unvouched: dict[str, str] = {}
    for key, (file, count) in found.items():
        width = _width(config, key[1])
        heads = None
        if by_heads and key[1] in _BY_HEADS:
            heads = config.num_kv_heads if key[1] is Stage.K_POST_ROPE else config.num_heads
            width = heads * len(tokens) if key[1] in ATTENTION_MAPS else width
        if key[0] >= config.num_layers:
            unvouched[file] = f"the model has {config.num_layers} layers"
        elif width is None:
            unvouched[file] = "the order of heads and positions is not said"
        elif count == width * len(tokens):
            entries[key] = _Entry(file, (len(tokens), width), everyone, None, heads=heads)
        elif count == width and key[1] in HEAD_STAGES:
            # Upstream runs the head for the last token only.
            entries[key] = _Entry(file, (1, width), everyone[-1:], None)
        elif count == width:
            unvouched[file] = f"it holds one of {len(tokens)} positions, and which is not said"
        else:
            unvouched[file] = f"expected {len(tokens)} x {width} elements, found {count}: other tokens or another model"
    return _assemble(folder, info, entries, unvouched)


def _width(config: ModelConfig, stage: Stage) -> int | None:
    """Elements per position; None for stages whose axes may lie in either order."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):
        return None
    if stage in (Stage.QKV_MATMUL, Stage.QKV_BIAS):
        return queries + 2 * keys
    if stage in (Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SILU, Stage.FFN_SWIGL):
        return config.intermediate_size
    special = {Stage.Q_POST_ROPE: queries, Stage.ATTENTION: queries, Stage.K_POST_ROPE: keys}
    return {**special, Stage.LM_HEAD: config.vocab_size}.get(stage, config.hidden_size)


def _assemble(
    folder: Path, info: TraceInfo, entries: Mapping[tuple[int, Stage], _Entry], unvouched: Mapping[str, str]
) -> AprtTrace:
    """Cuts final_norm and lm_head to the positions that both have, and keeps the provenance."""
    heads = [set(entry.positions) for key, entry in entries.items() if key[1] in HEAD_STAGES]
    common = tuple(sorted(set.intersection(*heads))) if heads else info.head_positions
    kept = {}
    for key in in_order(entries):
        entry = entries[key]
        wanted = common if key[1] in HEAD_STAGES else entry.positions
        kept[key] = replace(entry, rows=tuple(entry.positions.index(position) for position in wanted))
    provenance = read_provenance(folder)
    engine = {**info.engine, **({"provenance": provenance} if provenance else {})}
    return AprtTrace(folder, replace(info, head_positions=common, engine=engine), kept, dict(unvouched))
