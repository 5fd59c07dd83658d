"""Writing a Hugging Face folder that transformers loads: weights, config and tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aprjax.blocks import block_format
from aprjax.checkpoint.atomic import atomic_folder
from aprjax.checkpoint.gguf_writer import Progress
from aprjax.checkpoint.hf_config import special_ids, write_hf_config
from aprjax.checkpoint.hf_tokenizer import tokenizer_files
from aprjax.checkpoint.safetensors_format import METADATA_KEY
from aprjax.checkpoint.safetensors_reader import HEAD, INDEX_NAME
from aprjax.checkpoint.tensor_plan import PlannedTensor
from aprjax.checkpoint.types import CheckpointError, ModelConfig, Vocabulary

# The size that transformers' `save_pretrained` has long split at.
MAX_SHARD_BYTES = 5_000_000_000
FLOAT_TYPES = ("F32", "F16", "BF16")


def write_safetensors(
    path: str | Path,
    *,
    config: ModelConfig,
    tensors: Sequence[PlannedTensor],
    vocabulary: Vocabulary | None,
    chat_template: str | None,
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a folder, atomically, holding no more than a few MiB of tensor data in memory.

    Args:
        path: the folder; it must not exist yet, or be empty.
        config: becomes `config.json`; the head counts as tied when `tensors` hold no `lm_head.weight`.
        tensors: with canonical names and float types.
        vocabulary: becomes `tokenizer.json`; None leaves the tokenizer out.
        chat_template: goes into `tokenizer_config.json`.
        metadata: for the weight files' `__metadata__`.
        max_shard_bytes: size above which weights are cut into several files.
        progress: called with the tensor bytes written so far and the total.

    Raises:
        CheckpointError: a tensor is no float, the config cannot be told to transformers, or the
            folder cannot be written.
    """
    path = Path(path)
    for tensor in tensors:
        if tensor.block_type not in FLOAT_TYPES:
            raise CheckpointError(
                f"transformers reads {', '.join(FLOAT_TYPES)}, not {tensor.block_type}",
                file=path,
                tensor=tensor.name,
                fix="decode it to one of these",
            )
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.block_type] += tensor.source.size
    dtype = elements.most_common(1)[0][0] if elements else "F32"
    tied = all(tensor.name != HEAD for tensor in tensors)
    files: dict[str, dict[str, Any]] = {
        "config.json": write_hf_config(config, vocabulary, tied=tied, dtype=dtype),
        "generation_config.json": special_ids(vocabulary),
    }
    if vocabulary is not None:
        files |= tokenizer_files(vocabulary, chat_template)
    shards = _shards(tensors, max_shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        files[INDEX_NAME] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with atomic_folder(path) as folder:
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2 if name != "tokenizer.json" else None)
            (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        written = 0
        for name, shard in zip(names, shards, strict=True):
            for size in _write_file(folder / name, shard, metadata):
                written += size
                if progress is not None:
                    progress(written, total)


def _shards(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> Iterator[int]:
    """Write one weight file; yields the size of each piece of tensor data written."""
    # Wider types first, so that each tensor begins at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -block_format(tensor.block_type).block_bytes)
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt", **metadata}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.block_type, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for chunk in tensor.chunks():
                stream.write(chunk.data)
                yield chunk.nbytes
