"""Changes a GGUF file's bytes."""

from __future__ import annotations

import struct
from pathlib import Path


def patch(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def replace(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def truncate(path: Path, less: int) -> Path:
    path.write_bytes(path.read_bytes()[:-less])
    return path
