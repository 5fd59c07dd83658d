"""GGUF files (versions 2 and 3, single or split) as a `Checkpoint`: mapped, checked, undecoded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.blocks import UnknownBlockType, block_format, byte_size
from aprjax.checkpoint.config_rules import DEFAULT_ROPE_THETA, build_config, shortest_float32
from aprjax.checkpoint.gguf_format import GgufHeader, GgufMetadata, TensorInfo, parse_header
from aprjax.checkpoint.mapped_file import map_file
from aprjax.checkpoint.names import gguf_to_hf
from aprjax.checkpoint.structure import overlap_findings, structure_findings, vocabulary_findings
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor, Finding, ModelConfig, Vocabulary

ARCHITECTURES = ("qwen2",)
# `llama-gguf-split` names parts so; both numbers begin at 1 and have five digits.
_PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.DOTALL)
# The field of ModelConfig for each key `{architecture}.…` (llama.cpp's `LLM_KV_*`).
CONFIG_KEYS = {
    "num_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
    "head_dim": "attention.key_length",
}
# The field of Vocabulary for each key `tokenizer.ggml.…`.
VOCABULARY_KEYS = {
    "tokens": "tokens",
    "merges": "merges",
    "token_types": "token_type",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "padding_token_id",
    "add_bos": "add_bos_token",
    "pre_tokenizer": "pre",
    "model": "model",
}
CHAT_TEMPLATE_KEY = "tokenizer.chat_template"
ARCHITECTURE_KEY = "general.architecture"


class UnsupportedArchitecture(CheckpointError):
    """A sound GGUF file of another model family; its tensors can be listed, but not run."""


@dataclass(frozen=True)
class GgufFile:
    """The parts of a GGUF file before anything is made of them.

    Attributes:
        parts: paths, in order.
        header: the first part's header; it holds the metadata.
        tensors: by canonical name, in the order of the files.
        findings: deviations of the container.
    """

    parts: tuple[Path, ...]
    header: GgufHeader
    tensors: dict[str, EncodedTensor]
    findings: tuple[Finding, ...]


def read_gguf(path: str | Path) -> Checkpoint:
    """Open a GGUF file, or a split one by any of its parts.

    Args:
        path: `model.gguf`, or any `model-0000I-of-0000N.gguf`, whose siblings must lie beside it.

    Raises:
        CheckpointError: not a GGUF file, damaged, truncated, parts missing, no Qwen2, or a config
            with missing or impossible dimensions. What is merely odd becomes a `Finding`.
    """
    path = Path(path)
    gguf = read_gguf_file(path)
    metadata = gguf.header.metadata
    first = gguf.parts[0]
    architecture = metadata.get(ARCHITECTURE_KEY)
    if architecture not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"expected {ARCHITECTURE_KEY} to be one of {', '.join(ARCHITECTURES)}, found {str(architecture)[:80]!r}",
            file=first,
            offset=metadata.offsets.get(ARCHITECTURE_KEY, 0),
            fix="give a Qwen2 model; `inspect` lists the tensors of any GGUF file",
        )
    vocabulary = _vocabulary(first, metadata)
    config, config_findings = _config(first, architecture, metadata, gguf.tensors, vocabulary)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=gguf.tensors,
        vocabulary=vocabulary,
        chat_template=_typed(first, metadata, CHAT_TEMPLATE_KEY, str),
        metadata=metadata,
        findings=(
            *gguf.findings,
            *config_findings,
            *structure_findings(config, gguf.tensors),
            *vocabulary_findings(config, vocabulary),
        ),
        files=gguf.parts,
    )


def read_gguf_file(path: Path) -> GgufFile:
    """Parse the headers of all parts and place every tensor, whatever the architecture.

    Raises:
        CheckpointError: as `read_gguf`, short of what concerns the config.
    """
    parts = part_paths(path)
    headers: list[GgufHeader] = []
    tensors: dict[str, EncodedTensor] = {}
    findings: list[Finding] = []
    for part in parts:
        buffer = map_file(part)
        header = parse_header(buffer, part)
        headers.append(header)
        _check_part(part, header, len(headers) - 1, len(parts))
        expected_offset = 0
        for info in header.tensors:
            tensor = _place(part, buffer, header, info)
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{info.name!r} and {tensors[tensor.name].stored_name!r} are the same tensor of the model",
                    file=part,
                    tensor=tensor.name,
                    offset=info.entry_offset,
                    fix="write the file again with one tensor of each name",
                )
            tensors[tensor.name] = tensor
            if info.offset != expected_offset:
                findings.append(_offset_finding(tensor, info, header, expected_offset))
            aligned = header.metadata.alignment
            expected_offset = -(-(info.offset + tensor.nbytes) // aligned) * aligned
        missing = header.data_offset + expected_offset - buffer.size
        if header.tensors and missing > 0:
            message = f"{part.name} lacks {missing} bytes of padding after its last tensor; no weights are missing"
            findings.append(Finding("gguf-end-unpadded", "info", message, offset=buffer.size))
        findings += [
            Finding("gguf-invalid-utf8", "warning", f"{part.name}: {key!r} holds text that is not UTF-8")
            for key in header.metadata.malformed
        ]
    _check_total(parts[0], headers[0], len(tensors))
    findings += overlap_findings(tensors.values())
    return GgufFile(parts, headers[0], tensors, tuple(findings))


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of a split file given one of them; the path itself if its name is no part's.

    Raises:
        CheckpointError: parts are missing; the message names them.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, number, count, suffix = match[1], int(match[2]), int(match[3]), match[4]
    if not 1 <= number <= count:
        raise CheckpointError(f"part {number} of {count} cannot be", file=path, fix="give the file its own name back")
    parts = tuple(path.with_name(f"{stem}-{i:05d}-of-{count:05d}{suffix}") for i in range(1, count + 1))
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise CheckpointError(
            f"{len(missing)} of {count} parts are missing: {shown}", file=path, fix="download them beside this one"
        )
    return parts


def _check_part(part: Path, header: GgufHeader, index: int, count: int) -> None:
    metadata = header.metadata
    stated_count = metadata.get("split.count", count if count > 1 else 0)
    stated_index = metadata.get("split.no", index)
    # A merged file keeps split.count 0 (llama-gguf-split).
    if stated_count not in (count, 0 if count == 1 else count) or stated_index != index:
        raise CheckpointError(
            f"the header calls this part {_number(stated_index, 1)} of {_number(stated_count)}, "
            f"its name part {index + 1} of {count}",
            file=part,
            offset=metadata.offsets.get("split.no", metadata.offsets.get("split.count", 0)),
            fix="name the parts …-00001-of-0000N.gguf, as they were written",
        )


def _number(value: Any, add: int = 0) -> str:
    return str(value + add) if isinstance(value, int) else repr(value)[:40]


def _check_total(first: Path, header: GgufHeader, found: int) -> None:
    stated = header.metadata.get("split.tensors.count", found)
    if stated != found and header.metadata.get("split.count"):
        raise CheckpointError(
            f"expected {_number(stated)} tensors over all parts, found {found}",
            file=first,
            offset=header.metadata.offsets["split.tensors.count"],
            fix="the parts do not belong together, or are damaged: download them again",
        )


def _place(part: Path, buffer: np.ndarray, header: GgufHeader, info: TensorInfo) -> EncodedTensor:
    """Find a tensor's bytes in its file."""
    name = gguf_to_hf(info.name)
    try:
        blocks = block_format(info.ggml_type)
    except UnknownBlockType as error:
        raise CheckpointError(
            f"ggml type {info.ggml_type} is not known",
            file=part,
            tensor=info.name,
            offset=info.entry_offset,
            fix="the tensor list is damaged, or a newer llama.cpp wrote it: update aprjax",
        ) from error
    if info.dims[0] % blocks.block_size:
        raise CheckpointError(
            f"rows of {info.dims[0]} elements are no whole {blocks.name} blocks of {blocks.block_size}",
            file=part,
            tensor=info.name,
            offset=info.entry_offset,
            fix="the tensor list is damaged: download or convert the file again",
        )
    start = header.data_offset + info.offset
    size = byte_size(blocks.name, info.shape)
    if start + size > buffer.size:
        raise CheckpointError(
            f"{blocks.name} {list(info.shape)} takes bytes {start} to {start + size}, the file ends at {buffer.size}",
            file=part,
            tensor=info.name,
            offset=start,
            fix="the file is truncated, or its tensor list damaged: download or convert it again",
        )
    return EncodedTensor(
        name, info.shape, blocks.name, buffer[start : start + size], start, str(part), stored_name=info.name
    )


def _offset_finding(tensor: EncodedTensor, info: TensorInfo, header: GgufHeader, expected: int) -> Finding:
    aligned = info.offset % header.metadata.alignment == 0
    kind = "gguf-tensor-gap" if aligned else "gguf-tensor-unaligned"
    message = f"data offset {info.offset} where the tensors before end at {expected}; llama.cpp refuses such a file"
    return Finding(kind, "warning", message, tensor=tensor.name, offset=info.entry_offset)


def _typed(file: Path, metadata: GgufMetadata, key: str, *kinds: type) -> Any:
    """A metadata value, or None; of another type than llama.cpp would read is an error."""
    value = metadata.get(key)
    if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
        return value
    raise CheckpointError(
        f"expected {key} as {' or '.join(kind.__name__ for kind in kinds)}, found {metadata.types[key]}",
        file=file,
        offset=metadata.offsets[key],
        fix="the metadata is damaged: download or convert the file again",
    )


def _vocabulary(file: Path, metadata: GgufMetadata) -> Vocabulary | None:
    def get(field: str, *kinds: type) -> Any:
        return _typed(file, metadata, f"tokenizer.ggml.{VOCABULARY_KEYS[field]}", *kinds)

    def array(field: str, element: type) -> tuple[Any, ...]:
        key = f"tokenizer.ggml.{VOCABULARY_KEYS[field]}"
        values = _typed(file, metadata, key, tuple) or ()
        if values and type(values[0]) is not element:
            raise CheckpointError(
                f"expected {key} to hold {element.__name__}, found {metadata.types[key]}",
                file=file,
                offset=metadata.offsets[key],
                fix="the metadata is damaged: download or convert the file again",
            )
        return values

    tokens = array("tokens", str)
    if not tokens:
        return None
    return Vocabulary(
        tokens=tokens,
        merges=array("merges", str),
        token_types=array("token_types", int),
        bos_token_id=get("bos_token_id", int),
        eos_token_id=get("eos_token_id", int),
        padding_token_id=get("padding_token_id", int),
        add_bos=get("add_bos", bool),
        pre_tokenizer=get("pre_tokenizer", str),
        model=get("model", str),
    )


def _config(
    file: Path,
    architecture: str,
    metadata: GgufMetadata,
    tensors: dict[str, EncodedTensor],
    vocabulary: Vocabulary | None,
) -> tuple[ModelConfig, list[Finding]]:
    keys = {field: f"{architecture}.{key}" for field, key in CONFIG_KEYS.items()}
    numbers = {field: _uniform(metadata.get(key)) for field, key in keys.items()}
    findings: list[Finding] = []

    def default(field: str, value: Any, finding: str, why: str) -> None:
        if numbers[field] is None:
            numbers[field] = value
            findings.append(Finding(finding, "warning", f"{keys[field]} is absent; {why} {value}"))

    default("rope_theta", DEFAULT_ROPE_THETA, "rope-theta-defaulted", "llama.cpp takes")
    default("num_kv_heads", numbers["num_heads"], "kv-heads-defaulted", "llama.cpp takes one for each head:")
    if numbers["vocab_size"] is None:
        # Most files do not state it; llama.cpp counts the tokens, but the embedding is what is run.
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None:
            numbers["vocab_size"] = embedding.shape[0]
        elif vocabulary is not None:
            numbers["vocab_size"] = len(vocabulary.tokens)
    for field in ("rope_theta", "rms_norm_eps"):
        if isinstance(numbers[field], float):
            numbers[field] = shortest_float32(numbers[field])
    offsets = {field: metadata.offsets.get(key, 0) for field, key in keys.items()}
    config = build_config(file, architecture=architecture, keys=keys, offsets=offsets, **numbers)
    return config, findings + list(_rope_findings(architecture, metadata, config))


def _uniform(value: Any) -> Any:
    """One number for an array that repeats it for each layer, as GGUF allows; anything else unchanged."""
    if isinstance(value, tuple) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _rope_findings(architecture: str, metadata: GgufMetadata, config: ModelConfig) -> Iterable[Finding]:
    """What the file asks of the rotation or the attention that a plain Qwen2 does not do."""
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        message = f"rope scaling {str(scaling)[:40]!r} is not computed; positions are rotated without scaling"
        yield Finding("rope-scaling-unsupported", "error", message)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        factor = metadata.get(f"{architecture}.{key}", 1.0)
        if factor not in (0.0, 1.0) and scaling == "none":
            message = f"{architecture}.{key} is {str(factor)[:40]}; positions are rotated without scaling"
            yield Finding("rope-scaling-unsupported", "error", message)
    for key in ("rope.dimension_count", "attention.value_length"):
        width = metadata.get(f"{architecture}.{key}", config.head_dim)
        if width != config.head_dim:
            message = f"{architecture}.{key} is {str(width)[:40]}, the head width {config.head_dim}"
            yield Finding("head-width-mismatch", "error", message)
