"""Opening container D: header, flags, metadata text and index, without any idea of what model it holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.apr_compression import decompress
from aprjax.checkpoint.apr_container_checks import check_end, check_flags, check_header, check_index
from aprjax.checkpoint.apr_findings import FindingLog
from aprjax.checkpoint.apr_format import (
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_METADATA_SIZE,
    Flag,
    Header,
    IndexEntry,
    align,
    parse_index,
)
from aprjax.checkpoint.apr_identify import CONTAINER_D, HEAD_BYTES, JSON_WEIGHTS, identify, is_json_weights, refuse
from aprjax.checkpoint.apr_metadata import parse_metadata
from aprjax.checkpoint.mapped_file import map_file
from aprjax.checkpoint.types import CheckpointError

# Bytes hashed between two reports of progress.
_CRC_CHUNK = 1 << 24
_DAMAGED = "the file is damaged or truncated; copy, download or convert it again"


@dataclass(frozen=True)
class AprContainer:
    """What container D says about itself, whether or not a language model is in it.

    Attributes:
        path: the file.
        data: `uint8[bytes]`, the file (or, of a compressed file, its unpacked image).
        header: as stored.
        metadata: the JSON object as stored.
        entries: the index in the order of the file.
        log: the deviations met so far.
    """

    path: Path
    data: np.ndarray
    header: Header
    metadata: Mapping[str, Any]
    entries: tuple[IndexEntry, ...]
    log: FindingLog = field(repr=False)

    @property
    def end_of_data(self) -> int:
        """Offset just after the last tensor, without its padding."""
        return self.header.data_offset + max((entry.offset + entry.size for entry in self.entries), default=0)

    @property
    def end_of_padding(self) -> int:
        """Offset of the checksum that ends the file: the last tensor is padded as all others are."""
        return self.header.data_offset + align(self.end_of_data - self.header.data_offset)

    def tensor_bytes(self, entry: IndexEntry) -> np.ndarray:
        """The bytes of one tensor, `uint8[entry.size]`, a view.

        Raises:
            CheckpointError: they reach beyond the end of the file.
        """
        start = self.header.data_offset + entry.offset
        if start + entry.size > self.data.size:
            raise CheckpointError(
                f"the tensor takes bytes {start} to {start + entry.size}, the file ends at {self.data.size}: "
                f"{start + entry.size - self.data.size} bytes are missing. aprender refuses such a file; realizar "
                "takes the tensor as absent and computes with zeros (#2564, #2612)",
                file=self.path,
                tensor=entry.name,
                offset=start,
                fix="the file is truncated; copy or download it again",
            )
        return self.data[start : start + entry.size]


def read_container(path: str | Path, *, verify: bool = False) -> AprContainer:
    """Open an `.apr` file of container D.

    Args:
        path: the file.
        verify: also compare the CRC-32 at the end of the file, which reads all of it.

    Raises:
        CheckpointError: another container, a column-major or encrypted file, or a header, metadata or index that
            contradicts the file's length.
    """
    path = Path(path)
    data = map_file(path)
    head = data[:HEAD_BYTES].tobytes()
    container = identify(head, data.size)
    if container is not CONTAINER_D:
        raise refuse(container, path, head)
    log = FindingLog()
    try:
        header = Header.unpack(head)
        check_header(header, head, log)
        check_flags(header, log)
        data = _unpacked(data, header, path, log)
        _check_sections(header, data.size)
        metadata = _metadata(data, header, log)
        entries = _index(data, header, log)
    except CheckpointError as error:
        raise CheckpointError(
            error.message, file=path, tensor=error.tensor, offset=error.offset, fix=error.fix
        ) from None
    opened = AprContainer(path, data, header, metadata, entries, log)
    check_index(opened)
    check_end(opened)
    if verify:
        verify_footer(opened)
    return opened


def verify_footer(container: AprContainer, progress: Callable[[int], object] | None = None) -> bool:
    """Compare the CRC-32 that ends the file with its bytes; a difference goes to the container's log.

    No real reader ever checks it (apr-format.md 1.3), and it takes one pass over the file: opening leaves it out.

    Args:
        container: as opened.
        progress: called with the number of bytes done since its last call.

    Returns:
        Whether the checksum is there and right.
    """
    data = container.data
    start = container.end_of_padding
    if data.size < start + FOOTER_SIZE:
        return False
    crc = 0
    for begin in range(0, start, _CRC_CHUNK):
        piece = data[begin : min(begin + _CRC_CHUNK, start)]
        crc = zlib.crc32(piece.data, crc)
        if progress is not None:
            progress(piece.size)
    stored = int.from_bytes(data[start : start + FOOTER_SIZE].tobytes(), "little")
    if crc == stored:
        return True
    container.log.add(
        "apr-footer-crc-wrong",
        "warning",
        f"the CRC-32 at the end of the file is {stored:#010x}, its bytes give {crc:#010x}. No real tool verifies it; "
        "either the file was edited without renewing it, or bytes were damaged",
        offset=start,
        reference="apr-format.md 1.3",
    )
    return False


def _unpacked(data: np.ndarray, header: Header, path: Path, log: FindingLog) -> np.ndarray:
    compression = header.flags & (Flag.LZ4_COMPRESSED | Flag.ZSTD_COMPRESSED)
    if not compression:
        return data
    name = "LZ4" if compression & Flag.LZ4_COMPRESSED else "zstd"
    # A lone brace may begin an LZ4 length; only metadata and an index that parse are proof of a plain file.
    try:
        _check_sections(header, data.size)
        _metadata(data, header, FindingLog())
        _index(data, header, FindingLog())
    except CheckpointError:
        log.add(
            "apr-compressed",
            "warning",
            f"everything after the header is one {name} blob; it was unpacked into memory. Only realizar's AprV2Model "
            "reads it; aprender, MappedAprModel and AprTransformer would parse the compressed bytes",
            offset=6,
            reference="apr-format.md 1.2",
        )
        return np.frombuffer(decompress(data, header.flags, path), np.uint8)
    log.add(
        "apr-compression-flag-untrue",
        "warning",
        f"the header says {name}-compressed, but the file is plain: aprender's writer sets the bit without "
        "compressing. aprender and AprTransformer read it; AprV2Model tries to unpack it and fails",
        offset=6,
        reference="apr-format.md 1.2",
    )
    return data


def _check_sections(header: Header, size: int) -> None:
    metadata_end = header.metadata_offset + header.metadata_size
    for what, position, at in (
        ("the metadata end", metadata_end, 20),
        ("the tensor index begins", header.index_offset, 24),
        ("the tensor data begin", header.data_offset, 32),
    ):
        if position > size:
            raise CheckpointError(
                f"by the header {what} at {position}, the file ends at {size}", offset=at, fix=_DAMAGED
            )
    if header.metadata_offset < HEADER_SIZE or header.index_offset < HEADER_SIZE:
        raise CheckpointError(
            f"by the header the metadata begin at {header.metadata_offset} and the index at {header.index_offset}; "
            f"both must lie behind the header's {HEADER_SIZE} bytes",
            offset=12,
            fix=_DAMAGED,
        )
    if header.data_offset < header.index_offset:
        raise CheckpointError(
            f"by the header the data begin at {header.data_offset}, before the index at {header.index_offset}",
            offset=32,
            fix=_DAMAGED,
        )


def _metadata(data: np.ndarray, header: Header, log: FindingLog) -> dict[str, Any]:
    start = header.metadata_offset
    if header.metadata_size > MAX_METADATA_SIZE:
        log.add(
            "apr-metadata-large",
            "info",
            f"{header.metadata_size} bytes of metadata; aprender names {MAX_METADATA_SIZE} as the limit, and enforces "
            "it nowhere",
            offset=20,
        )
    return parse_metadata(data[start : start + header.metadata_size].tobytes(), start, log)


def _index(data: np.ndarray, header: Header, log: FindingLog) -> tuple[IndexEntry, ...]:
    index = data.data[header.index_offset : header.data_offset]
    if is_json_weights(index[:8].tobytes()):
        raise CheckpointError(
            f"this is {JSON_WEIGHTS.description} (container {JSON_WEIGHTS.letter}), not an APR v2 model",
            offset=header.index_offset,
            fix="export the model again with `apr import`, or convert its original GGUF file",
        )
    if header.index_offset < header.metadata_offset + header.metadata_size:
        log.add("apr-sections-overlap", "warning", "the tensor index begins inside the metadata", offset=24)
    return tuple(parse_index(index, header.tensor_count, header.index_offset))
