"""One `.safetensors` file: its header checked against its size, its tensors as views.

Layout (huggingface/safetensors README): a little-endian u64 header length, that many bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {string: string}}`, and the
data, which the offsets count from and which the tensors must tile without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.blocks import byte_size
from aprjax.checkpoint.json_file import MAX_JSON_BYTES, parse_json
from aprjax.checkpoint.mapped_file import map_file
from aprjax.checkpoint.types import CheckpointError, EncodedTensor, Finding

# The names that safetensors and aprjax.blocks both use; its other types (F8_E4M3, U8, BOOL, …) hold no Qwen2 weights.
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")
METADATA_KEY = "__metadata__"
_LENGTH_BYTES = 8
_FIX = "the file is truncated or damaged: download it again"
# NumPy's limit (NPY_MAXDIMS is 64 since 2.0; 32 before), far above any weight's.
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class SafetensorsFile:
    """The tensors of one file, in the order of their bytes, and its `__metadata__`."""

    path: Path
    tensors: dict[str, EncodedTensor]
    metadata: dict[str, str]
    findings: tuple[Finding, ...]


def read_safetensors_file(path: Path) -> SafetensorsFile:
    """Map one file and check its header.

    Raises:
        CheckpointError: the header is damaged, or places a tensor outside the file.
    """
    buffer = map_file(path)
    if buffer.size < _LENGTH_BYTES:
        raise CheckpointError(
            f"expected a header length of {_LENGTH_BYTES} bytes, the file ends after {buffer.size}",
            file=path,
            offset=0,
            fix=_FIX,
        )
    length = int.from_bytes(buffer[:_LENGTH_BYTES].tobytes(), "little")
    left = buffer.size - _LENGTH_BYTES
    if length > min(left, MAX_JSON_BYTES):
        raise CheckpointError(
            f"the header claims {length} bytes where {left} are left (limit {MAX_JSON_BYTES})",
            file=path,
            offset=0,
            fix=_FIX,
        )
    data_start = _LENGTH_BYTES + length
    content = parse_json(buffer[_LENGTH_BYTES:data_start].data, path, offset=_LENGTH_BYTES)
    metadata = content.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"expected {METADATA_KEY} to map strings to strings", file=path, offset=_LENGTH_BYTES, fix=_FIX
        )
    placed = [_place(path, buffer, data_start, name, entry) for name, entry in content.items()]
    placed.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    findings = []
    expected = data_start
    for tensor in placed:
        if tensor.offset != expected:
            message = (
                f"begins at {tensor.offset} where the tensors before end at {expected}; the official library refuses"
            )
            findings.append(Finding("safetensors-gap", "warning", message, tensor=tensor.name, offset=tensor.offset))
        expected = tensor.offset + tensor.nbytes
    if expected != buffer.size:
        message = f"{buffer.size - expected} bytes after the last tensor; the official library refuses such a file"
        findings.append(Finding("safetensors-trailing-bytes", "warning", message, offset=expected))
    return SafetensorsFile(path, {tensor.name: tensor for tensor in placed}, metadata, tuple(findings))


def _place(path: Path, buffer: np.ndarray, data_start: int, name: str, entry: Any) -> EncodedTensor:
    def fail(message: str, offset: int = _LENGTH_BYTES) -> CheckpointError:
        return CheckpointError(message, file=path, tensor=name[:200], offset=offset, fix=_FIX)

    # It will stand in messages: no control characters for a terminal to obey, no lone surrogates.
    if not name.isprintable():
        raise fail("the name of a tensor is not printable")
    if not isinstance(entry, dict):
        raise fail(f"expected an object in the header, found {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise fail(f"dtype {str(dtype)[:40]!r} holds no weights that can be read; known are {', '.join(DTYPES)}")
    shape, offsets = _counts(shape, high=buffer.size), _counts(offsets, high=buffer.size)
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise fail(f"expected a shape of up to {_MAX_DIMENSIONS} sizes, found {str(entry.get('shape'))[:80]}")
    if offsets is None or len(offsets) != 2:
        raise fail(f"expected two data_offsets within {buffer.size} bytes, found {str(entry.get('data_offsets'))[:80]}")
    size = byte_size(dtype, shape)
    begin, end = offsets
    if end - begin != size:
        raise fail(f"{dtype} {list(shape)} takes {size} bytes, data_offsets say {end - begin}")
    start = data_start + begin
    if start + size > buffer.size:
        raise fail(f"takes bytes {start} to {start + size}, the file ends at {buffer.size}", start)
    return EncodedTensor(name, shape, dtype, buffer[start : start + size], start, str(path), stored_name=name)


def _counts(values: Any, *, high: int) -> tuple[int, ...] | None:
    """The values if they are a list of integers between 0 and `high`."""
    if isinstance(values, list) and all(type(value) is int and 0 <= value <= high for value in values):
        return tuple(values)
    return None
