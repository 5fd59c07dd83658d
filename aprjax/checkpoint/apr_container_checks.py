"""What deviates in the header, the flags, the index and the ends of container D (apr-format.md 1.2, 1.3)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from aprjax.checkpoint.apr_findings import FindingLog, listing, shown
from aprjax.checkpoint.apr_format import (
    ALIGNMENT,
    FOOTER_SIZE,
    HEADER_SIZE,
    INSPECT_PREFIX_CAP,
    KNOWN_FLAGS,
    MAX_NAME_LENGTH,
    MAX_RANK,
    VERSION,
    Flag,
    Header,
    IndexEntry,
    header_crc,
)
from aprjax.checkpoint.types import CheckpointError

if TYPE_CHECKING:
    from aprjax.checkpoint.apr_container import AprContainer


def check_header(header: Header, head: bytes, log: FindingLog) -> None:
    """Checksum, version, metadata offset and reserved bytes; `head` begins with the header's bytes."""
    computed = header_crc(head)
    if header.crc == 0 and computed != 0:
        log.add(
            "apr-header-crc-zero",
            "warning",
            "the header has no checksum, as realizar's to_apr_bytes writes it. aprender refuses the file; realizar "
            "does not look at it",
            offset=40,
            reference="#194, realizar#44, BUG-APR-044",
        )
    elif header.crc != computed:
        log.add(
            "apr-header-crc-wrong",
            "error",
            f"the header's checksum is {header.crc:#010x}, its bytes give {computed:#010x}: the header was damaged or "
            "edited. aprender refuses the file; realizar does not look at it",
            offset=40,
            reference="#194, realizar#44",
        )
    if header.version != VERSION:
        log.add(
            "apr-version",
            "warning",
            f"version {header.version[0]}.{header.version[1]}, expected 2.0. No real reader looks at it; `apr "
            "validate` fails",
            offset=4,
        )
    if header.metadata_offset != HEADER_SIZE:
        log.add(
            "apr-metadata-offset",
            "info",
            f"the metadata begin at {header.metadata_offset}; every writer puts them at {HEADER_SIZE}",
            offset=12,
        )
    if any(header.reserved):
        log.add(
            "apr-header-reserved", "info", "the reserved bytes of the header are not zero; readers skip them", offset=44
        )


def check_flags(header: Header, log: FindingLog) -> None:
    """The flags, but for compression.

    Raises:
        CheckpointError: the file is encrypted or column-major.
    """
    flags = header.flags
    if flags & Flag.ENCRYPTED:
        raise CheckpointError(
            "the header says that the file is encrypted (flag 0x0004), which no reader of APR v2 implements",
            offset=6,
            fix="ask for the plain file; if it is plain, clear the flag and renew the header checksum",
        )
    if flags & Flag.LAYOUT_COLUMN_MAJOR:
        raise CheckpointError(
            "the header says that matrices are column-major (flag 0x0800), which APR v2 forbids (LAYOUT-002). "
            "aprender refuses the file; realizar ignores the flag and would multiply by the transposed matrices",
            offset=6,
            fix="re-convert the model with a current `apr import` or `python -m aprjax convert`",
        )
    if not flags & Flag.LAYOUT_ROW_MAJOR:
        log.add(
            "apr-layout-flag-absent",
            "info",
            f"flags {flags:#06x} do not say that matrices are row-major (0x0400), as in old files and those of "
            "realizar's converter. All readers take them as row-major",
            offset=6,
            reference="LAYOUT-001",
        )
    if flags & Flag.SHARDED:
        log.add(
            "apr-sharded",
            "warning",
            "the header says that this is one shard of several (flag 0x0010). No real loader joins shards: tensors of "
            "the others count as missing",
            offset=6,
            reference="apr-format.md 1.2",
        )
    if flags & Flag.SIGNED:
        log.add(
            "apr-signed",
            "info",
            "the header says that the file is signed; nothing writes or checks signatures",
            offset=6,
        )
    if unknown := flags & ~KNOWN_FLAGS & 0xFFFF:
        log.add("apr-flags-unknown", "info", f"unknown flag bits {unknown:#06x}; readers ignore them", offset=6)


def check_index(container: AprContainer) -> None:
    """Order, names, ranks and offsets of the index entries."""
    header, entries, log = container.header, container.entries, container.log
    names = [entry.name.encode() for entry in entries]
    unsorted = next((i for i in range(1, len(names)) if names[i] < names[i - 1]), None)
    if unsorted is not None:
        log.add(
            "apr-index-unsorted",
            "warning",
            f"the index is not sorted by name: {shown(entries[unsorted].name)} follows "
            f"{shown(entries[unsorted - 1].name)}. aprender refuses the file; realizar reads it",
            tensor=entries[unsorted].name,
            offset=entries[unsorted].position,
            reference="#194, realizar#44, BUG-APR-044",
        )
    seen: dict[str, IndexEntry] = {}
    for entry in entries:
        length = len(entry.name.encode())
        if entry.name in seen:
            log.add(
                "apr-duplicate-name",
                "error",
                "the name occurs twice in the index; the last entry counts, as in realizar. aprender accepts the "
                "file, and may find either",
                tensor=entry.name,
                offset=entry.position,
            )
        seen[entry.name] = entry
        if length == 0 or length > MAX_NAME_LENGTH:
            log.add(
                "apr-name-length",
                "warning",
                f"a name of {length} bytes; aprender's writer cuts names at {MAX_NAME_LENGTH} and never writes an "
                "empty one",
                tensor=entry.name,
                offset=entry.position,
            )
        if len(entry.shape) > MAX_RANK:
            log.add(
                "apr-rank",
                "warning",
                f"rank {len(entry.shape)}; aprender refuses the file above {MAX_RANK}, realizar has no limit",
                tensor=entry.name,
                offset=entry.position,
            )
    _check_offsets(container)
    if header.data_offset > INSPECT_PREFIX_CAP:
        log.add(
            "apr-data-offset-far",
            "warning",
            f"the data begin at {header.data_offset}; `apr lint` and `apr inspect` refuse files above "
            f"{INSPECT_PREFIX_CAP}",
            offset=32,
        )


def _check_offsets(container: AprContainer) -> None:
    header, log = container.header, container.log
    if header.data_offset % ALIGNMENT:
        log.add(
            "apr-data-unaligned",
            "warning",
            f"the data begin at {header.data_offset}, no multiple of {ALIGNMENT}, as realizar's to_apr_bytes writes "
            "it. All readers accept it",
            offset=32,
            reference="F-APR-FORMAT-002",
        )
    unaligned = [entry.name for entry in container.entries if entry.offset % ALIGNMENT]
    if unaligned:
        log.add(
            "apr-tensor-unaligned",
            "info",
            f"{len(unaligned)} tensors do not begin at a multiple of {ALIGNMENT}: {listing(unaligned)}. All readers "
            "accept it",
            reference="F-APR-FORMAT-002",
        )
    by_offset = sorted((entry for entry in container.entries if entry.size), key=lambda entry: entry.offset)
    if any(a.offset > b.offset for a, b in pairwise(container.entries)):
        log.add(
            "apr-offsets-not-monotonic",
            "info",
            "tensors lie in another order than the index, as aprender's streaming writer leaves them. All readers use "
            "the offsets",
            reference="apr-format.md 1.2",
        )
    overlaps = [b.name for a, b in pairwise(by_offset) if a.offset + a.size > b.offset]
    if overlaps:
        log.add(
            "apr-tensors-overlap",
            "error",
            f"{len(overlaps)} tensors begin inside the one before them: {listing(overlaps)}. No writer shares bytes "
            "between tensors; offsets or sizes are wrong",
            tensor=overlaps[0],
        )


def check_end(container: AprContainer) -> None:
    """What follows the last tensor: padding, checksum, and nothing else."""
    end, size, log = container.end_of_padding, container.data.size, container.log
    if size < container.end_of_data:
        return  # truncated: `tensor_bytes` says so for the tensor that is cut
    if size < end + FOOTER_SIZE:
        log.add(
            "apr-footer-missing",
            "info",
            f"the file ends at {size}, without the padding and CRC-32 that should end it at {end + FOOTER_SIZE}, as "
            "realizar's converter leaves it, or a copy that lost its last bytes. No real reader looks for them",
            offset=size,
            reference="apr-format.md 1.3",
        )
    elif size > end + FOOTER_SIZE:
        log.add(
            "apr-trailing-bytes",
            "info",
            f"{size - end - FOOTER_SIZE} bytes follow the end of the file's last section; readers ignore them",
            offset=end + FOOTER_SIZE,
        )
