"""Unpacking of compressed files of container D, in which one LZ4 block or zstd frame follows the header."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from aprjax.checkpoint.apr_format import HEADER_SIZE, Flag
from aprjax.checkpoint.types import CheckpointError

# LZ4 can at best describe 255 bytes by one. Encoded weights are close to incompressible; a zstd frame that claims
# a thousandfold gain is an attack or damage, and is not unpacked.
LZ4_GREATEST_RATIO = 255
ZSTD_ACCEPTED_RATIO = 1000


def decompress(data: Any, flags: int, file: Path) -> bytes:
    """The whole file image of a compressed container D (apr-format.md 1.2: one blob follows the header).

    Args:
        data: the file, as a buffer.
        flags: of the header; LZ4 is tried when both bits are set, as realizar does.
        file: for messages.

    Returns:
        The 64 header bytes followed by the unpacked blob, to which all offsets of the header refer.

    Raises:
        CheckpointError: the decompressor is not installed, the blob is damaged, or it claims an absurd size.
    """
    blob = memoryview(data)[HEADER_SIZE:]
    unpack = _unpack_lz4 if flags & Flag.LZ4_COMPRESSED else _unpack_zstd
    return bytes(memoryview(data)[:HEADER_SIZE]) + unpack(blob, file)


def _unpack_lz4(blob: memoryview, file: Path) -> bytes:
    try:
        import lz4.block  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise _needs("lz4", file) from None
    claimed = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else 0
    if claimed > LZ4_GREATEST_RATIO * len(blob):
        raise _damaged(f"the LZ4 block of {len(blob)} bytes claims to hold {claimed}", file)
    try:
        return lz4.block.decompress(bytes(blob[4:]), uncompressed_size=claimed)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise _damaged(f"the LZ4 block does not unpack: {error}", file) from None


def _unpack_zstd(blob: memoryview, file: Path) -> bytes:
    try:
        import zstandard  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise _needs("zstandard", file) from None
    limit = ZSTD_ACCEPTED_RATIO * len(blob)
    pieces: list[bytes] = []
    total = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(bytes(blob)) as stream:
            while piece := stream.read(1 << 20):
                pieces.append(piece)
                total += len(piece)
                if total > limit:
                    raise _damaged(f"the zstd frame of {len(blob)} bytes unpacks to more than {limit}", file)
    except zstandard.ZstdError as error:
        raise _damaged(f"the zstd frame does not unpack: {error}", file) from None
    return b"".join(pieces)


def _needs(package: str, file: Path) -> CheckpointError:
    return CheckpointError(
        f"the file is compressed as a whole, and the Python package `{package}` that unpacks it is not installed",
        file=file,
        offset=HEADER_SIZE,
        fix=f"pip install {package}, or re-export the model without compression (aprender reads no compressed file)",
    )


def _damaged(what: str, file: Path) -> CheckpointError:
    return CheckpointError(what, file=file, offset=HEADER_SIZE, fix="the file is damaged; copy or download it again")
