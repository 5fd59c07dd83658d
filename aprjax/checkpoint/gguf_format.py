"""The header of a GGUF file (versions 2 and 3), parsed from mapped bytes.

Layout (ggml `docs/gguf.md`), all little-endian:

    "GGUF"  u32 version  u64 tensor_count  u64 metadata_count
    metadata_count x { string key, u32 type, value }
    tensor_count   x { string name, u32 n_dims, u64 dims[n_dims] (innermost first), u32 ggml_type, u64 offset }
    padding to general.alignment, then the tensor data that the offsets count from

A string is a u64 length and that many bytes of UTF-8; an array is a u32 element type, a u64 count
and the elements. Every count and length is checked against the bytes left before it is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from aprjax.checkpoint.gguf_strings import StringArrayError, read_string_array
from aprjax.checkpoint.types import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# ggml's GGUF_DEFAULT_ALIGNMENT, in force when `general.alignment` is absent.
DEFAULT_ALIGNMENT = 32
# ggml's GGML_MAX_DIMS.
MAX_DIMENSIONS = 4
# Sixteen times the largest vocabularies in use (262,144 tokens): a lying count may at worst cost
# the memory of a list this long, and only in a file that has the bytes for it.
MAX_ARRAY_ELEMENTS = 1 << 22
# Chat templates are a few kB; nothing in a header needs more.
MAX_STRING_BYTES = 1 << 24

STRING, ARRAY, BOOL = "STRING", "ARRAY", "BOOL"
# GGUF's number of each value type (ggml `enum gguf_type`).
TYPE_NAMES = {
    0: "UINT8",
    1: "INT8",
    2: "UINT16",
    3: "INT16",
    4: "UINT32",
    5: "INT32",
    6: "FLOAT32",
    7: BOOL,
    8: STRING,
    9: ARRAY,
    10: "UINT64",
    11: "INT64",
    12: "FLOAT64",
}
TYPE_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}
# NumPy's spelling of the fixed-size types.
SCALAR_DTYPES = {
    "UINT8": "<u1",
    "INT8": "<i1",
    "UINT16": "<u2",
    "INT16": "<i2",
    "UINT32": "<u4",
    "INT32": "<i4",
    "FLOAT32": "<f4",
    BOOL: "|b1",
    "UINT64": "<u8",
    "INT64": "<i8",
    "FLOAT64": "<f8",
}
# Fewest bytes an entry can take: an empty key, its type and a one-byte value; a nameless tensor of no dimensions.
_SMALLEST_ENTRY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class GgufMetadata(Mapping[str, Any]):
    """A GGUF file's key-value pairs in the order of the file, with the type each was written in.

    Values are `str`, `int`, `float`, `bool`, or a tuple of one of these. `types` spells a scalar
    `"UINT32"` and an array `"ARRAY[STRING]"`. `alignment` is the one in force for the tensor data,
    `malformed` the keys whose text is not UTF-8, `offsets` where each entry begins in the file.
    """

    values_by_key: Mapping[str, Any]
    types: Mapping[str, str]
    alignment: int = DEFAULT_ALIGNMENT
    malformed: tuple[str, ...] = ()
    offsets: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)

    def __repr__(self) -> str:
        return f"GgufMetadata({len(self)} keys)"


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor list, checked for form but not yet against the data that follows.

    `dims` is GGUF's order, innermost first; `offset` counts from the start of the tensor data;
    `entry_offset` is where the entry stands in the file.
    """

    name: str
    dims: tuple[int, ...]
    ggml_type: int
    offset: int
    entry_offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape, `(out, in)` for a matrix."""
        return self.dims[::-1]


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensor data of one file."""

    version: int
    metadata: GgufMetadata
    tensors: tuple[TensorInfo, ...]
    data_offset: int


def parse_header(buffer: np.ndarray, file: Path) -> GgufHeader:
    """Parse the header of a mapped GGUF file.

    Args:
        buffer: `uint8[bytes]`, the whole file.
        file: its path, for messages.

    Raises:
        CheckpointError: not GGUF, another version or byte order, or a header that does not fit the file.
    """
    return _Parser(buffer, file).header()


class _Parser:
    """A position in the file that only moves over bytes that exist."""

    def __init__(self, buffer: np.ndarray, file: Path) -> None:
        self.buffer = buffer
        self.view = buffer.data
        self.file = file
        self.position = 0

    def fail(self, message: str, *, offset: int | None = None, tensor: str | None = None, fix: str = "") -> NoReturn:
        raise CheckpointError(
            message,
            file=self.file,
            tensor=tensor,
            offset=self.position if offset is None else offset,
            fix=fix or "the file is damaged or truncated: download or convert it again",
        )

    def left(self) -> int:
        return self.buffer.size - self.position

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left():
            self.fail(f"expected {what} ({size} bytes), the file ends after {self.left()}")
        self.position += size
        return self.view[self.position - size : self.position]

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def count(self, what: str, smallest: int) -> int:
        start = self.position
        count = self.u64(f"the number of {what}")
        if count > self.left() // smallest:
            self.fail(
                f"claims {count} {what}, which take at least {smallest} bytes each, where {self.left()} bytes are left",
                offset=start,
            )
        return count

    def raw_string(self, what: str) -> bytes:
        start = self.position
        size = self.u64(f"the length of {what}")
        if size > self.left():
            self.fail(f"{what} claims {size} bytes where {self.left()} are left in the file", offset=start)
        if size > MAX_STRING_BYTES:
            self.fail(f"{what} claims {size} bytes; the limit is {MAX_STRING_BYTES}", offset=start)
        return bytes(self.take(size, what))

    def name(self, what: str) -> str:
        start = self.position
        raw = self.raw_string(what)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:40]!r}", offset=start)
        # It will stand in messages: no control characters for a terminal to obey.
        if not text.isprintable():
            self.fail(f"{what} is not printable: {text[:40]!r}", offset=start)
        return text

    def header(self) -> GgufHeader:
        version = self.version()
        tensor_count = self.count("tensors", _SMALLEST_TENSOR)
        metadata = self.metadata(self.count("metadata entries", _SMALLEST_ENTRY))
        if tensor_count > self.left() // _SMALLEST_TENSOR:
            self.fail(f"claims {tensor_count} tensors where {self.left()} bytes are left for their list")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(tensor_count):
            info = self.tensor()
            if info.name in tensors:
                self.fail(
                    f"the name stands twice in the tensor list, first at {tensors[info.name].entry_offset}",
                    offset=info.entry_offset,
                    tensor=info.name,
                    fix="write the file again with one tensor of each name",
                )
            tensors[info.name] = info
        data_offset = -(-self.position // metadata.alignment) * metadata.alignment
        return GgufHeader(version, metadata, tuple(tensors.values()), data_offset)

    def version(self) -> int:
        magic = bytes(self.take(min(4, self.left()), "the magic"))
        if magic != MAGIC:
            self.fail(f"expected the magic {MAGIC!r}, found {magic!r}", offset=0, fix="give the path of a GGUF file")
        version = self.u32("the version")
        if version in VERSIONS:
            return version
        # A small number in the other byte order has its low half empty.
        if version and version & 0xFFFF == 0:
            self.fail(
                f"a big-endian GGUF file (version bytes {version:#010x}); only little-endian files are read",
                offset=4,
                fix="convert it with `gguf-convert-endian FILE little`",
            )
        detail = " (32-bit lengths, before August 2023)" if version == 1 else ""
        self.fail(
            f"GGUF version {version}{detail}; versions {VERSIONS[0]} and {VERSIONS[1]} are read",
            offset=4,
            fix="convert the model again with a current llama.cpp",
        )

    def metadata(self, count: int) -> GgufMetadata:
        values: dict[str, Any] = {}
        types: dict[str, str] = {}
        offsets: dict[str, int] = {}
        malformed: list[str] = []
        for _ in range(count):
            start = self.position
            key = self.name("a metadata key")
            if key in values:
                self.fail(f"metadata key {key!r} stands twice", offset=start, fix="write the file with one of them")
            offsets[key] = start
            values[key], types[key], sound = self.value(key)
            if not sound:
                malformed.append(key)
        return GgufMetadata(values, types, self.alignment(values, types, offsets), tuple(malformed), offsets)

    def alignment(self, values: dict[str, Any], types: dict[str, str], offsets: dict[str, int]) -> int:
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        declared = types.get("general.alignment", "UINT32")
        if declared != "UINT32" or alignment == 0 or alignment & (alignment - 1):
            self.fail(
                f"general.alignment must be a power of two in UINT32, found {repr(alignment)[:40]} in {declared}",
                offset=offsets["general.alignment"],
            )
        return alignment

    def type_name(self, what: str) -> str:
        start = self.position
        number = self.u32(f"the type of {what}")
        if number not in TYPE_NAMES:
            self.fail(f"{what} has value type {number}; GGUF knows 0 to {len(TYPE_NAMES) - 1}", offset=start)
        return TYPE_NAMES[number]

    def value(self, key: str) -> tuple[Any, str, bool]:
        """The value, its type, and whether its strings were valid UTF-8."""
        type_name = self.type_name(f"metadata key {key!r}")
        if type_name == STRING:
            raw = self.raw_string(f"the value of {key!r}")
            try:
                return raw.decode(), type_name, True
            except UnicodeDecodeError:
                return raw.decode(errors="surrogateescape"), type_name, False
        if type_name == ARRAY:
            return self.array(key)
        dtype = np.dtype(SCALAR_DTYPES[type_name])
        return np.frombuffer(self.take(dtype.itemsize, f"the value of {key!r}"), dtype)[0].item(), type_name, True

    def array(self, key: str) -> tuple[tuple[Any, ...], str, bool]:
        start = self.position
        element = self.type_name(f"the elements of {key!r}")
        if element == ARRAY:
            self.fail(f"{key!r} is an array of arrays, which llama.cpp does not read either", offset=start)
        dtype = None if element == STRING else np.dtype(SCALAR_DTYPES[element])
        size = 8 if dtype is None else dtype.itemsize
        count = self.count(f"elements of {key!r}", size)
        if count > MAX_ARRAY_ELEMENTS:
            self.fail(f"{key!r} claims {count} elements; the limit is {MAX_ARRAY_ELEMENTS}", offset=start)
        spelled = f"{ARRAY}[{element}]"
        if dtype is not None:
            data = self.take(count * size, f"{count} elements of {key!r}")
            return tuple(np.frombuffer(data, dtype).tolist()), spelled, True
        try:
            texts, self.position, malformed = read_string_array(
                self.buffer, self.position, count, longest=MAX_STRING_BYTES
            )
        except StringArrayError as error:
            self.fail(f"in {key!r}: {error}", offset=error.offset)
        return tuple(texts), spelled, not malformed

    def tensor(self) -> TensorInfo:
        start = self.position
        name = self.name("a tensor name")
        dimensions = self.u32(f"the number of dimensions of {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"expected 1 to {MAX_DIMENSIONS} dimensions, found {dimensions}", offset=start, tensor=name)
        dims = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, f"the dimensions of {name!r}"))
        # Elements of a tensor must be countable in the bits of the file; one element takes at least one bit.
        elements = 1
        for size in dims:
            elements *= size
        if elements == 0 or elements > 8 * self.buffer.size:
            self.fail(
                f"dimensions {list(dims)} (innermost first) do not fit a file of {self.buffer.size} bytes",
                offset=start,
                tensor=name,
            )
        return TensorInfo(name, dims, self.u32(f"the type of {name!r}"), self.u64(f"the offset of {name!r}"), start)
