"""Writing APR v2 files as apr-format.md 0 says that every real reader accepts them.

`write_apr` writes a model; `write_container` below it writes any metadata and index, sound or not, for tests.
The same input gives the same bytes: real writers order custom keys by a random hash, this one by insertion.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from aprjax.blocks import byte_size
from aprjax.checkpoint.apr_dtypes import may_pad_rows
from aprjax.checkpoint.apr_format import (
    DTYPE_OF_BLOCK_TYPE,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_NAME_LENGTH,
    MAX_RANK,
    SAFE_BLOCK_TYPES,
    Flag,
    Header,
    IndexEntry,
    align,
)
from aprjax.checkpoint.apr_metadata import ALIASES, ALWAYS_WRITTEN
from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import CheckpointError, ModelConfig, Vocabulary

# Keys of the real tools' metadata structure, in the order in which it is serialized (apr-format.md 2.1).
STRUCT_ORDER = (
    *("model_type", "name", "description", "author", "license", "data_source", "data_license", "version", "source"),
    *("original_format", "created_at", "total_size", "param_count", "quantization", "sharding", "chat_template"),
    *("chat_format", "special_tokens", "architecture", "hf_architecture", "hf_model_type", "hidden_size", "num_layers"),
    *("num_heads", "num_kv_heads", "vocab_size", "intermediate_size", "max_position_embeddings", "rope_theta"),
    *("rope_type", "rms_norm_eps", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_SPELLING_OF = {alias: canonical for canonical, aliases in ALIASES.items() for alias in aliases}


class TensorSource(Protocol):
    """What the writer needs of a tensor; `EncodedTensor` and `PlannedTensor` are such.

    `data` is asked for once, when the tensor's turn to be written has come, and not kept: a source may decode or widen
    there, so that a converted model is never in memory as a whole. Where there is a method `chunks`, which yields the
    same bytes in pieces, that is used instead.
    """

    @property
    def name(self) -> str:
        """Name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        ...

    @property
    def block_type(self) -> str:
        """Name of the block type."""
        ...

    @property
    def data(self) -> np.ndarray:
        """`uint8[bytes]`."""
        ...


@dataclass(frozen=True)
class RawEntry:
    """A tensor for `write_container`, with every field of its index entry open to be wrong.

    Attributes:
        name: as it will stand in the index.
        dtype: the dtype byte.
        shape: as it will stand in the index.
        size: bytes, as the index will say and as `chunks` yields.
        chunks: returns the bytes, in pieces.
        offset: relative to the data section; `None`: where the tensor lands.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[Any]]
    offset: int | None = None


def write_apr(
    path: str | Path,
    *,
    config: ModelConfig,
    tensors: Iterable[TensorSource],
    vocabulary: Vocabulary | None,
    chat_template: str | None = None,
    extra_metadata: Mapping[str, Any] | None = None,
    source_metadata: Mapping[str, Any] | None = None,
    tied_embeddings: bool = False,
    original_format: str | None = None,
    allow_any_type: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a Qwen2 as an APR v2 file, atomically.

    Args:
        path: of the file; its folder must exist.
        config: dimensions and constants.
        tensors: with canonical names and `(out, in)` shapes, `lm_head.weight` among them (`from_apr` demands it: write
            a copy of the embedding for a tied model). Their data are asked for one at a time, in the order of names.
        vocabulary: tokens and merges, without which the real tool cannot run the file.
        chat_template: Jinja text; written at the top level and as `tokenizer.chat_template`, as `apr import` does.
        extra_metadata: further keys; they replace computed ones of the same name. `None` drops a key.
        source_metadata: passed through under that key (PMAT-836).
        tied_embeddings: note that the head was synthesized from the embedding.
        original_format: `"gguf"` or `"safetensors"`.
        allow_any_type: also write AprQ4 and AprQ8, which one of realizar's loaders cannot read, and K-quants whose
            rows are no whole blocks, on whose layout the readers disagree.
        progress: called with the number of tensor bytes written since its last call.

    Raises:
        CheckpointError: a tensor of a type, name or shape that APR cannot hold, no `lm_head.weight`, or metadata that
            would poison realizar's parse.
    """
    path = Path(path)
    sources = sorted(tensors, key=lambda tensor: tensor.name.encode())
    _check_sources(path, sources, allow_any_type=allow_any_type)
    entries = [_entry(source) for source in sources]
    metadata = build_metadata(
        config,
        sources=sources,
        sizes=[entry.size for entry in entries],
        vocabulary=vocabulary,
        chat_template=chat_template,
        source_metadata=source_metadata,
        tied_embeddings=tied_embeddings,
        original_format=original_format,
    )
    for key, value in (extra_metadata or {}).items():
        canonical = _SPELLING_OF.get(key)
        if canonical is not None and canonical in metadata:
            raise CheckpointError(
                f"the metadata key {key!r} is another spelling of {canonical!r}: realizar would lose all metadata "
                "(#2254)",
                file=path,
                fix=f"leave out {key!r}",
            )
        if value is None and key not in ALWAYS_WRITTEN:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    with atomic_file(path) as stream:
        write_container(stream, metadata=metadata, entries=entries, progress=progress)


def build_metadata(
    config: ModelConfig,
    *,
    sources: Sequence[TensorSource],
    sizes: Sequence[int],
    vocabulary: Vocabulary | None,
    chat_template: str | None,
    source_metadata: Mapping[str, Any] | None = None,
    tied_embeddings: bool = False,
    original_format: str | None = None,
) -> dict[str, Any]:
    """The metadata of a model: canonical keys once each, no nulls besides the three that are always written."""
    metadata: dict[str, Any] = {
        "model_type": config.architecture,
        "license": None,
        "data_source": None,
        "data_license": None,
        "version": "1.0.0",
        "original_format": original_format,
        "total_size": sum(sizes),
        "param_count": sum(int(np.prod(source.shape, dtype=np.int64)) for source in sources),
        "chat_template": chat_template,
        "architecture": config.architecture,
        "hf_architecture": "Qwen2ForCausalLM" if config.architecture == "qwen2" else None,
        "hf_model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_type": 2 if config.rope_pairing == "neox" else 0,
        "rms_norm_eps": config.rms_norm_eps,
        "head_dim": config.head_dim,
    }
    if vocabulary is not None:
        metadata |= {
            "tokenizer.vocabulary": list(vocabulary.tokens),
            "tokenizer.merges": list(vocabulary.merges),
            "tokenizer.vocab_size": len(vocabulary.tokens),
            "tokenizer.bos_token_id": vocabulary.bos_token_id,
            "tokenizer.eos_token_id": vocabulary.eos_token_id,
            "tokenizer.padding_token_id": vocabulary.padding_token_id,
            "tokenizer.add_bos_token": vocabulary.add_bos,
            "tokenizer.token_type": list(vocabulary.token_types) or None,
            "tokenizer.pre_type": vocabulary.pre_tokenizer,
            "tokenizer.model": vocabulary.model,
        }
    metadata |= {
        "tokenizer.chat_template": chat_template,
        "tensor_shapes": {source.name: list(source.shape) for source in sources},
        "source_metadata": dict(source_metadata) if source_metadata else None,
        "tied_embeddings": True if tied_embeddings else None,
    }
    return {key: value for key, value in metadata.items() if value is not None or key in ALWAYS_WRITTEN}


def metadata_bytes(metadata: Mapping[str, Any]) -> bytes:
    """Compact JSON: struct keys in the order of the real tools, then the others as they come.

    Raises:
        CheckpointError: NaN, an infinity, or a value that JSON cannot hold.
    """
    ordered = {key: metadata[key] for key in STRUCT_ORDER if key in metadata}
    ordered |= {key: value for key, value in metadata.items() if key not in ordered}
    try:
        return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata cannot be written as JSON: {error}") from None


def write_container(
    stream: BinaryIO,
    *,
    metadata: Mapping[str, Any] | bytes,
    entries: Sequence[RawEntry],
    flags: int = int(Flag.LAYOUT_ROW_MAJOR),
    sort: bool = True,
    footer: bool = True,
    header_checksum: int | None = None,
    data_shift: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write container D to a stream, front to back, without seeking.

    The defaults give what the real writers give; each switch makes one deviation.

    Args:
        stream: binary, positioned at the start.
        metadata: a mapping, or the bytes of the section.
        entries: data are written in this order, and asked for one at a time.
        flags: of the header.
        sort: sort index and data by name; otherwise both keep the order given.
        footer: end with the CRC-32.
        header_checksum: a false one; `None` computes it.
        data_shift: bytes by which the data section is moved off its aligned place.
        progress: called with the number of tensor bytes written since its last call.

    Raises:
        CheckpointError: a source returns another number of bytes than its entry says.
    """
    text = metadata if isinstance(metadata, bytes) else metadata_bytes(metadata)
    ordered = sorted(entries, key=lambda entry: entry.name.encode()) if sort else list(entries)
    index = b"".join(entry.pack() for entry in _placed(ordered))
    index_offset = HEADER_SIZE + align(len(text))
    data_offset = index_offset + align(len(index)) + data_shift
    header = Header(
        tensor_count=len(ordered),
        metadata_size=len(text),
        index_offset=index_offset,
        data_offset=data_offset,
        flags=flags,
        crc=header_checksum,
    )
    front = (header.pack() + text).ljust(index_offset, b"\0") + index
    crc = _write(stream, front.ljust(data_offset, b"\0"), 0)
    for entry in ordered:
        written = 0
        for chunk in entry.chunks():
            piece = _bytes_of(chunk)
            crc = _write(stream, piece, crc)
            written += len(piece)
            if progress is not None:
                progress(len(piece))
        if written != entry.size:
            raise CheckpointError(
                f"the tensor was to have {entry.size} bytes, its source gave {written}", tensor=entry.name
            )
        crc = _write(stream, bytes(align(entry.size) - entry.size), crc)
    if footer:
        stream.write(crc.to_bytes(FOOTER_SIZE, "little"))


def _write(stream: BinaryIO, piece: bytes | memoryview, crc: int) -> int:
    stream.write(piece)
    return zlib.crc32(piece, crc)


def _bytes_of(chunk: Any) -> bytes | memoryview:
    """A chunk as bytes; a view of it where it has any (memoryview cannot cast an empty array)."""
    view = np.ascontiguousarray(chunk).data if isinstance(chunk, np.ndarray) else memoryview(chunk)
    return view.cast("B") if view.nbytes else b""


def _placed(entries: Sequence[RawEntry]) -> Iterator[IndexEntry]:
    position = 0
    for entry in entries:
        offset = position if entry.offset is None else entry.offset
        yield IndexEntry(entry.name, entry.dtype, entry.shape, offset, entry.size)
        position += align(entry.size)


def _entry(source: TensorSource) -> RawEntry:
    size = byte_size(source.block_type, source.shape, row_padded=getattr(source, "row_padded", False))
    dtype = DTYPE_OF_BLOCK_TYPE[source.block_type]
    chunks = getattr(source, "chunks", lambda: (source.data,))
    return RawEntry(source.name, dtype, source.shape, size, chunks)


def _check_sources(path: Path, sources: Sequence[TensorSource], *, allow_any_type: bool) -> None:
    types = tuple(DTYPE_OF_BLOCK_TYPE) if allow_any_type else SAFE_BLOCK_TYPES

    def refuse(source: TensorSource, message: str, fix: str) -> CheckpointError:
        return CheckpointError(message, file=path, tensor=source.name, fix=fix)

    previous = None
    for source in sources:
        if source.name == previous:
            raise refuse(source, "two tensors have this name", "leave one of them out")
        previous = source.name
        if source.block_type not in types:
            raise refuse(
                source,
                f"{source.block_type} has no dtype byte that all readers take alike; they share {', '.join(types)}",
                "widen the tensor to F32",
            )
        if not allow_any_type and may_pad_rows(source.block_type, source.shape):
            raise refuse(
                source,
                f"{source.block_type} rows of {source.shape[-1]} elements are no whole blocks, and readers disagree on "
                "how they lie (apr-format.md 4.4)",
                "widen the tensor to F32",
            )
        if not 1 <= len(source.name.encode()) <= MAX_NAME_LENGTH or len(source.shape) > MAX_RANK:
            raise refuse(
                source,
                f"names have 1 to {MAX_NAME_LENGTH} bytes and tensors a rank up to {MAX_RANK}; this name has "
                f"{len(source.name.encode())}, the tensor rank {len(source.shape)}",
                "rename or reshape the tensor",
            )
    if not any(source.name == "lm_head.weight" for source in sources):
        raise CheckpointError(
            "lm_head.weight is missing, without which realizar's from_apr refuses the file",
            file=path,
            fix="for a tied model, write a copy of the embedding under that name and tied_embeddings=True",
        )
