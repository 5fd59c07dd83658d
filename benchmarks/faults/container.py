"""A small, independent view of an APR v2 file for planting faults: parse it, replace parts, write it again.

It shares no code with `aprjax.checkpoint`, whose reader is what the planted faults put to the test.
Layout: docs of `aprjax/checkpoint/apr_format.py`; only well-formed files of container D are taken.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_CHUNK = 1 << 24
# dtype byte -> ggml's name; those that a conservative writer emits.
DTYPES = {0: "F32", 1: "F16", 12: "Q4_K", 14: "Q6_K", 30: "BF16"}

GGUF_LEAVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_GLOBALS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class PlantError(Exception):
    """The fault cannot be planted in this file; the message says why."""


@dataclass(frozen=True)
class Computed:
    """Bytes that are made when they are written, so that edited tensors are never in memory all at once."""

    size: int
    make: Callable[[], Any]

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored.

    Attributes:
        name: in the file.
        dtype: the byte of the index.
        shape: row-major.
        pieces: its bytes, in order: buffers or `Computed`.
        kind: ggml's name of the block type, where `dtype` is not APR's.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    pieces: tuple[Any, ...]
    kind: str = ""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(len(piece) for piece in self.pieces)

    @property
    def type_name(self) -> str:
        """Name of the block type, as ggml spells it."""
        return self.kind or DTYPES.get(self.dtype, f"dtype {self.dtype}")

    def whole(self) -> bytes:
        """All bytes, copied."""
        return b"".join(_made(piece) for piece in self.pieces)

    def with_bytes(self, *pieces: Any) -> Tensor:
        """The same tensor with other bytes."""
        return replace(self, pieces=pieces)


@dataclass
class AprFile:
    """A parsed file. Change `metadata_text`, `tensors` or `header_crc_xor`, then `write`."""

    flags: int
    metadata_text: str
    tensors: dict[str, Tensor]
    header_crc_xor: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    _mapping: Any = field(default=None, repr=False)
    _clean: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> AprFile:
        """Parse a file; its tensors stay views of the mapped file."""
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 64:
                raise PlantError(f"{path} is no APR v2 file: {size} bytes")
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        magic, major, minor, flags, count = struct.unpack_from("<4sBBHI", mapping, 0)
        metadata_at, metadata_size, index_at, data_at = struct.unpack_from("<QIQQ", mapping, 12)
        if magic != b"APR\0" or (major, minor) != (2, 0) or metadata_at != 64:
            raise PlantError(f"{path} is no APR v2 file")
        if flags & 7:
            raise PlantError(f"{path} is compressed or encrypted")
        view = memoryview(mapping)
        text = bytes(view[metadata_at : metadata_at + metadata_size]).decode()
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, int] = {}
        cursor = index_at
        for _ in range(count):
            (length,) = struct.unpack_from("<H", view, cursor)
            name = bytes(view[cursor + 2 : cursor + 2 + length]).decode()
            cursor += 2 + length
            dtype, rank = struct.unpack_from("<BB", view, cursor)
            shape = struct.unpack_from(f"<{rank}Q", view, cursor + 2)
            cursor += 2 + 8 * rank
            offset, nbytes = struct.unpack_from("<QQ", view, cursor)
            cursor += 16
            if data_at + offset + nbytes > size or name in tensors:
                raise PlantError(f"{path}: tensor {name} is cut off or occurs twice; plant faults in a sound file")
            tensors[name] = Tensor(name, dtype, shape, (view[data_at + offset : data_at + offset + nbytes],))
            offsets[name] = data_at + offset
        return cls(flags, text, tensors, offsets=offsets, _mapping=mapping, _clean=dict(tensors))

    def same_layout(self, source: Path) -> bool:
        """Whether only bytes of tensors differ from the file, whose path this is, so that `patches` is all there is."""
        if self.header_crc_xor or self.tensors.keys() != self._clean.keys():
            return False
        pairs = [(tensor, self._clean[name]) for name, tensor in self.tensors.items()]
        same = all((a.type_name, a.shape, a.size) == (b.type_name, b.shape, b.size) for a, b in pairs)
        return same and AprFile.read(source).metadata_text == self.metadata_text

    @property
    def patches(self) -> dict[int, bytes]:
        """By offset: the bytes of tensors that differ from the file's. The checksum at its end is not among them."""
        changed = [name for name, tensor in self.tensors.items() if tensor is not self._clean[name]]
        return {self.offsets[name]: self.tensors[name].whole() for name in changed}

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata as an object."""
        return json.loads(self.metadata_text)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, under that name or GGUF's."""
        for spelling in (name, gguf_name(name)):
            if spelling in self.tensors:
                return self.tensors[spelling]
        raise PlantError(f"there is no tensor {name} in the file; layers begin at 0, see --layer")

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor of that name."""
        self.tensors[tensor.name] = tensor

    def remove(self, name: str) -> None:
        """Leave a tensor out, by its Hugging Face name."""
        del self.tensors[self.tensor(name).name]

    def set_key(self, key: str, value: Any) -> Any:
        """Replace one top-level value of the metadata, leaving every other byte as it is; returns the old value."""
        text, decoder = self.metadata_text, json.JSONDecoder()
        cursor = text.index("{") + 1
        while True:
            cursor = _skip(text, cursor, " \t\r\n,")
            if text[cursor] == "}":
                raise PlantError(f"the metadata have no key {key!r}")
            found, cursor = decoder.raw_decode(text, cursor)
            cursor = _skip(text, cursor, " \t\r\n:")
            old, end = decoder.raw_decode(text, cursor)
            if found == key:
                self.metadata_text = text[:cursor] + json.dumps(value) + text[end:]
                return old
            cursor = end

    def write(self, path: Path) -> None:
        """Write the file, tensors in the order of `tensors`; it appears under its name when it is whole."""
        metadata = self.metadata_text.encode()
        index, position = b"", 0
        for tensor in self.tensors.values():
            name = tensor.name.encode()
            index += struct.pack("<H", len(name)) + name + struct.pack("<BB", tensor.dtype, len(tensor.shape))
            index += struct.pack(f"<{len(tensor.shape)}QQQ", *tensor.shape, position, tensor.size)
            position += _align(tensor.size)
        index_at = 64 + _align(len(metadata))
        data_at = index_at + _align(len(index))
        head = struct.pack("<4sBBHI", b"APR\0", 2, 0, self.flags, len(self.tensors))
        head += struct.pack("<QIQQ", 64, len(metadata), index_at, data_at)
        crc = zlib.crc32(head + bytes(20)) ^ self.header_crc_xor
        head += struct.pack("<I", crc) + bytes(20)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("xb") as stream:
                footer = _copy(stream, [head, _padded(metadata), _padded(index)], 0)
                for tensor in self.tensors.values():
                    footer = _copy(stream, tensor.pieces, footer)
                    footer = _copy(stream, [bytes(_align(tensor.size) - tensor.size)], footer)
                stream.write(struct.pack("<I", footer))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name."""
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_GLOBALS:
        return f"{GGUF_GLOBALS[stem]}.{kind}"
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[3] in GGUF_LEAVES:
        return f"blk.{parts[2]}.{GGUF_LEAVES[parts[3]]}.{kind}"
    return name


def _made(piece: Any) -> Any:
    return piece.make() if isinstance(piece, Computed) else piece


def _skip(text: str, cursor: int, characters: str) -> int:
    while text[cursor] in characters:
        cursor += 1
    return cursor


def _align(size: int) -> int:
    return -(-size // 64) * 64


def _padded(data: bytes) -> bytes:
    return data.ljust(_align(len(data)), b"\0")


def _copy(stream: Any, pieces: Iterable[Any], crc: int) -> int:
    for piece in map(_made, pieces):
        for start in range(0, len(piece), _CHUNK):
            part = piece[start : start + _CHUNK]
            stream.write(part)
            crc = zlib.crc32(part, crc)
    return crc
