"""Writing GGUF version 3: any metadata with its exact types, tensors streamed from where they lie.

gguf-py's `GGUFWriter` drops empty strings and arrays and chooses the types of arrays by their first
element, so it cannot give a file its own metadata back; hence a writer of our own. The layout is in
`gguf_format`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aprjax.blocks import block_format
from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.gguf_format import ARRAY, MAGIC, SCALAR_DTYPES, STRING, TYPE_NUMBERS, GgufMetadata
from aprjax.checkpoint.tensor_plan import PlannedTensor
from aprjax.checkpoint.types import CheckpointError

VERSION = 3
Progress = Callable[[int, int], None]


def write_gguf(
    path: str | Path, *, metadata: GgufMetadata, tensors: Sequence[PlannedTensor], progress: Progress | None = None
) -> None:
    """Write a GGUF file, atomically, holding no more than a few MiB of tensor data in memory.

    Args:
        path: the file to write.
        metadata: keys, values and types, written in their order; its alignment places the tensors.
        tensors: names as GGUF spells them, in the order to write them.
        progress: called with the tensor bytes written so far and the total.

    Raises:
        CheckpointError: a value does not fit its type, a tensor's type is not one of ggml's or does
            not divide its rows, or the file cannot be written.
    """
    path = Path(path)
    total = sum(tensor.nbytes for tensor in tensors)
    with atomic_file(path) as stream:
        stream.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            stream.writelines(_pack_entry(path, key, metadata.types[key], value))
        offset = 0
        for tensor in tensors:
            stream.write(_pack_tensor_info(path, tensor, offset))
            offset += _aligned(tensor.nbytes, metadata.alignment)
        _pad(stream, metadata.alignment)
        written = 0
        for tensor in tensors:
            for chunk in tensor.chunks():
                stream.write(chunk.data)
                written += chunk.nbytes
                if progress is not None:
                    progress(written, total)
            _pad(stream, metadata.alignment)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(stream: BinaryIO, alignment: int) -> None:
    position = stream.tell()
    stream.write(bytes(_aligned(position, alignment) - position))


def _pack_string(text: str) -> bytes:
    # surrogateescape gives back the bytes of text that was not UTF-8 when it was read.
    raw = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _pack_entry(path: Path, key: str, spelled: str, value: Any) -> Iterator[bytes]:
    yield _pack_string(key)
    try:
        if spelled.startswith(ARRAY):
            element = spelled[len(ARRAY) + 1 : -1]
            yield struct.pack("<IIQ", TYPE_NUMBERS[ARRAY], TYPE_NUMBERS[element], len(value))
            yield _pack_values(element, value)
        else:
            yield struct.pack("<I", TYPE_NUMBERS[spelled])
            yield _pack_values(spelled, (value,))
    except (KeyError, OverflowError, TypeError, ValueError, AttributeError, FloatingPointError) as error:
        raise CheckpointError(
            f"metadata key {key!r}: {str(value)[:60]!r} cannot be written as {spelled} ({error})",
            file=path,
            fix="correct the value in the source file",
        ) from error


def _pack_values(type_name: str, values: Sequence[Any]) -> bytes:
    if type_name == STRING:
        return b"".join(map(_pack_string, values))
    # NumPy would turn 1.5 into the integer 1 and a text into a number.
    kinds = {"B": (bool,), "F": (float, int)}.get(type_name[0], (int,))
    if not {type(value) for value in values} <= set(kinds):
        raise TypeError(f"expected {kinds[0].__name__}")
    with np.errstate(over="raise"):
        return np.array(values, SCALAR_DTYPES[type_name]).tobytes()


def _pack_tensor_info(path: Path, tensor: PlannedTensor, offset: int) -> bytes:
    blocks = block_format(tensor.block_type)
    if blocks.ggml_id is None or not tensor.shape or tensor.shape[-1] % blocks.block_size:
        raise CheckpointError(
            f"GGUF cannot hold {blocks.name} of shape {list(tensor.shape)}",
            file=path,
            tensor=tensor.name,
            fix="widen it to float32",
        )
    dims = tensor.shape[::-1]
    return _pack_string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, blocks.ggml_id, offset)
