"""The APR v2 container, byte by byte (container D of apr-format.md 1.2 and 3): header, flags, index.

Everything is little-endian. Sections lie in this order, each zero-padded to 64 bytes: header (64 bytes), JSON
metadata, tensor index, tensor data; four bytes of CRC-32 over everything before them end the file.

    offset size  header field
    0      4     41 50 52 00 (APR and a zero)
    4      1+1   version 2, 0
    6      2     flags (`Flag`)
    8      4     number of tensors
    12     8     metadata offset (writers: 64)
    20     4     metadata size, without padding
    24     8     index offset
    32     8     data offset
    40     4     CRC-32 of bytes 0..40 and 44..64
    44     20    reserved

    index entry: u16 name length, name, u8 dtype, u8 rank, rank x u64 dimensions (outermost first),
                 u64 offset from the data section, u64 size in bytes without padding
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from aprjax.checkpoint.types import CheckpointError

MAGIC = b"APR\x00"
VERSION = (2, 0)
HEADER_SIZE = 64
ALIGNMENT = 64
FOOTER_SIZE = 4

# aprender's writer cuts longer names; its reader refuses a rank above 8 (apr-format.md 1.2 and 1.3).
MAX_NAME_LENGTH = 256
MAX_RANK = 8
# A constant of aprender that no reader enforces (apr-format.md 1.2).
MAX_METADATA_SIZE = 16 << 20
# `apr lint` and `apr inspect` refuse a file whose data begins later (HEADER_READ_CAP, apr-format.md 1.2).
INSPECT_PREFIX_CAP = 256 << 20
# NumPy arrays have at most 64 dimensions: an entry of higher rank is a damaged one.
READABLE_RANK = 64

_HEADER = struct.Struct("<4sBBHIQIQQI20s")
_ENTRY_TAIL = struct.Struct("<QQ")
# Shortest possible entry: empty name, rank 0.
ENTRY_MINIMUM = 2 + 1 + 1 + _ENTRY_TAIL.size


class Flag(enum.IntFlag):
    """Bits of the header's flags (apr-format.md 1.2). Readers ignore bits they do not know."""

    LZ4_COMPRESSED = 0x0001
    ZSTD_COMPRESSED = 0x0002
    ENCRYPTED = 0x0004
    SIGNED = 0x0008
    SHARDED = 0x0010
    QUANTIZED = 0x0020
    HAS_FILTERBANK = 0x0040
    HAS_MODEL_CARD = 0x0080
    STREAMING = 0x0100
    HAS_VOCAB = 0x0200
    LAYOUT_ROW_MAJOR = 0x0400
    LAYOUT_COLUMN_MAJOR = 0x0800


KNOWN_FLAGS = int(~Flag(0))

# dtype byte -> block type, as aprender writes it today (apr-format.md 3.1).
DTYPE_BYTES: dict[int, str] = {
    0: "F32",
    1: "F16",
    3: "F64",
    4: "I32",
    5: "I64",
    6: "I8",
    7: "U8",
    12: "Q4_K",
    14: "Q6_K",
    30: "BF16",
    128: "AprQ4",
    129: "AprQ8",
}
# What both of realizar's loaders and aprender read alike: the only bytes that a conservative writer emits
# (apr-format.md 0).
SAFE_BLOCK_TYPES = ("F32", "F16", "BF16", "Q4_K", "Q6_K")
DTYPE_OF_BLOCK_TYPE: dict[str, int] = {name: byte for byte, name in DTYPE_BYTES.items()}


def align(position: int) -> int:
    """The next multiple of 64 at or above `position`."""
    return (position + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


def header_crc(header: bytes) -> int:
    """CRC-32 of the 64 header bytes without the checksum field, which is skipped and not zeroed."""
    return zlib.crc32(header[44:HEADER_SIZE], zlib.crc32(header[:40]))


@dataclass(frozen=True)
class Header:
    """The 64 bytes at the start of the file. `crc` is the stored checksum; `None` when writing means: compute it."""

    tensor_count: int
    metadata_size: int
    index_offset: int
    data_offset: int
    flags: int = int(Flag.LAYOUT_ROW_MAJOR)
    metadata_offset: int = HEADER_SIZE
    version: tuple[int, int] = VERSION
    crc: int | None = None
    reserved: bytes = bytes(20)

    def pack(self) -> bytes:
        """The header's 64 bytes."""
        packed = _HEADER.pack(
            MAGIC,
            *self.version,
            self.flags,
            self.tensor_count,
            self.metadata_offset,
            self.metadata_size,
            self.index_offset,
            self.data_offset,
            self.crc or 0,
            self.reserved,
        )
        if self.crc is not None:
            return packed
        return packed[:40] + struct.pack("<I", header_crc(packed)) + packed[44:]

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read the header from the first 64 bytes of a file; checks nothing but their number.

        Raises:
            CheckpointError: fewer than 64 bytes.
        """
        if len(data) < HEADER_SIZE:
            raise CheckpointError(
                f"an APR v2 header takes {HEADER_SIZE} bytes, the file has {len(data)}",
                offset=len(data),
                fix="the file is truncated; copy or download it again",
            )
        fields = _HEADER.unpack_from(data)
        return cls(
            version=(fields[1], fields[2]),
            flags=fields[3],
            tensor_count=fields[4],
            metadata_offset=fields[5],
            metadata_size=fields[6],
            index_offset=fields[7],
            data_offset=fields[8],
            crc=fields[9],
            reserved=fields[10],
        )


@dataclass(frozen=True)
class IndexEntry:
    """One tensor of the index, as stored.

    Attributes:
        name: as in the file.
        dtype: the dtype byte, whose meaning readers dispute (`apr_dtypes`).
        shape: dimensions as stored, outermost first.
        offset: of the first byte, relative to the data section.
        size: in bytes, without padding.
        position: absolute offset of the entry itself (0 for entries that are to be written).
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    position: int = 0

    @property
    def elements(self) -> int:
        """Number of elements, as an unbounded integer."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count

    def pack(self) -> bytes:
        """The entry's bytes."""
        name = self.name.encode()
        return b"".join(
            (
                struct.pack("<H", len(name)),
                name,
                struct.pack("<BB", self.dtype, len(self.shape)),
                struct.pack(f"<{len(self.shape)}Q", *self.shape),
                _ENTRY_TAIL.pack(self.offset, self.size),
            )
        )


def parse_index(index: bytes | memoryview, count: int, position: int) -> Iterator[IndexEntry]:
    """The entries of the tensor index, in the order of the file.

    Args:
        index: the bytes between the index offset and the data section.
        count: number of tensors that the header announces.
        position: absolute offset of the index, for messages.

    Raises:
        CheckpointError: an entry runs over the end of the index, has a name that is not UTF-8, or a rank above 64.
    """
    fix = "the index is damaged or was written by another container version; re-convert the model"
    if count * ENTRY_MINIMUM > len(index):
        raise CheckpointError(
            f"the header announces {count} tensors, which take at least {count * ENTRY_MINIMUM} bytes of index; there "
            f"are {len(index)}",
            offset=position,
            fix=fix,
        )
    cursor = 0
    for number in range(count):
        start = cursor
        try:
            (length,) = struct.unpack_from("<H", index, cursor)
            cursor += 2
            raw_name = bytes(index[cursor : cursor + length])
            cursor += length
            dtype, rank = struct.unpack_from("<BB", index, cursor)
            cursor += 2
            shape = struct.unpack_from(f"<{rank}Q", index, cursor)
            cursor += 8 * rank
            offset, size = _ENTRY_TAIL.unpack_from(index, cursor)
            cursor += _ENTRY_TAIL.size
        except struct.error:
            raise CheckpointError(
                f"entry {number} of {count} runs over the end of the tensor index ({len(index)} bytes)",
                offset=position + start,
                fix=fix,
            ) from None
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"the name of entry {number} of {count} is not UTF-8: {raw_name[:40]!r}",
                offset=position + start,
                fix=fix,
            ) from None
        if rank > READABLE_RANK:
            raise CheckpointError(
                f"entry {number} of {count} ({name[:80]!r}) has rank {rank}; no array has more than {READABLE_RANK}",
                offset=position + start,
                fix=fix,
            )
        yield IndexEntry(name, dtype, shape, offset, size, position + start)
