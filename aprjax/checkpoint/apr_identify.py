"""Which container with the extension `.apr` a file is (apr-format.md 1.1).

Ten layouts share the extension and two of them the magic. Only container D holds language models that we
read; each other one is refused by name, so that nobody mistakes "another format" for "a damaged file".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from aprjax.checkpoint.apr_format import HEADER_SIZE, MAGIC, VERSION, header_crc
from aprjax.checkpoint.types import CheckpointError

# Bytes of a file that `identify` looks at: a header and the beginning of what follows.
HEAD_BYTES = 4096
# Values of the compression byte in container A (apr-format.md 1.4); the bundles of apr-cookbook have other headers.
_APRN_COMPRESSIONS = range(4)


@dataclass(frozen=True)
class Container:
    """One of the containers of apr-format.md 1.1: its letter there, and what it is in words."""

    letter: str
    description: str


CONTAINER_D = Container("D", "APR v2")
_A = Container("A", "an APRN v1 container: a classic (non-language) model of aprender")
_B = Container("B", "an APR1 container of aprender's early `serialization::apr` module")
_B_LZ4 = Container("B'", "an LZ4-compressed wrapper around aprender's early APR1 container")
_B_ZSTD = Container("B'", "a zstd-compressed wrapper around aprender's early APR1 container")
_B_APR2 = Container("B'", "an APR2 compressed wrapper around aprender's early APR1 container")
_C = Container("C", "an APR1 container of whisper.apr: a speech model")
_E = Container("E", "realizar's early memory-mapped 'APR Transformer' (version 1 or less)")
_F = Container("F", "a debugging file of realizar's GgufToAprConverter, which holds all weights as one JSON text")
_I = Container("I", "an APRN bundle of apr-cookbook")


def identify(head: bytes, size: int) -> Container | None:
    """The container that a file with these first bytes is, `None` when it is none that uses the extension `.apr`.

    Args:
        head: the first `HEAD_BYTES` bytes (or all, of a smaller file).
        size: of the file, in bytes.
    """
    magic = head[:4]
    if magic == b"APRN":
        return _A if _is_aprn_v1(head, size) else _I
    if magic == b"APR1":
        length = struct.unpack_from("<I", head, 4)[0] if len(head) >= 8 else 0
        return _B if head[8:9] == b"{" and length <= size else _C
    if magic == b"APR2":
        return _B_APR2
    if magic != MAGIC:
        return None
    if len(head) >= HEADER_SIZE:
        (metadata_offset,) = struct.unpack_from("<Q", head, 12)
        (stored_crc,) = struct.unpack_from("<I", head, 40)
        # A file with one damaged field must not turn into "another container": offset or checksum suffices.
        if metadata_offset == HEADER_SIZE or (tuple(head[4:6]) == VERSION and stored_crc == header_crc(head)):
            return CONTAINER_D
    if head[4:5] in (b"\x01", b"\x02") and len(head) >= 9 and head[4:8] != b"\x01\0\0\0":
        # A D header that was cut short also begins with version byte 2, followed by a zero.
        if head[4:6] == bytes(VERSION) and len(head) < HEADER_SIZE:
            return CONTAINER_D
        return _B_LZ4 if head[4] == 1 else _B_ZSTD
    if len(head) >= 8 and struct.unpack_from("<I", head, 4)[0] <= 1:
        return _E
    return CONTAINER_D


def is_json_weights(metadata_index: bytes) -> bool:
    """Whether the bytes where the tensor index should be are the JSON index of container F."""
    return metadata_index.lstrip()[:2] == b"[{"


def refuse(container: Container | None, file: Path, head: bytes) -> CheckpointError:
    """The error that names what a file is, when it is not container D."""
    if container is None:
        return CheckpointError(
            f"expected an APR file, which begins with {MAGIC!r}; found {head[:8]!r}",
            file=file,
            offset=0,
            fix="check the path; GGUF and safetensors files are opened by their content whatever their name",
        )
    return CheckpointError(
        f"this is {container.description} (container {container.letter}), not an APR v2 model",
        file=file,
        offset=0,
        fix="re-export the model with a current `apr import`, or convert its original GGUF or safetensors file",
    )


JSON_WEIGHTS = _F


def _is_aprn_v1(head: bytes, size: int) -> bool:
    if len(head) < 32 or head[4:6] != b"\x01\x00":
        return False
    metadata_size, payload_size = struct.unpack_from("<II", head, 8)
    return head[20] in _APRN_COMPRESSIONS and 32 + metadata_size + payload_size <= size
