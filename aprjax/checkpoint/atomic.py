"""Outputs that are whole or absent: written under a temporary name, moved into place at the end."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aprjax.checkpoint.types import CheckpointError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write that appears as `path` when the block ends, and not at all when it fails.

    The bytes reach the disk before the name does, and a file that stood at `path` stays until then.

    Raises:
        CheckpointError: the file cannot be written (no such folder, disk full, not permitted).
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError("a folder stands where the file is to be written", file=path, fix="choose another name")
    partial = _partial_name(path)
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that appears as `path` when the block ends, and not at all when it fails.

    Raises:
        CheckpointError: `path` is a file or a folder with something in it, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            "already there and not an empty folder", file=path, fix="remove it or choose another name"
        )
    partial = _partial_name(path)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_name(path: Path) -> Path:
    # In the target's own folder: a move across file systems would be a copy, which can stop halfway.
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot be written: {error.strerror or error}",
        file=path,
        fix="free some space, or choose a folder that exists and can be written to; nothing was left behind",
    )
