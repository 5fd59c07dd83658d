"""Outputs that are whole or absent: they have no name before they are complete.

On Linux a file is written without any name (`O_TMPFILE`) and given one at the end, so that a process that is killed
leaves nothing behind. Elsewhere, and for folders, the work goes on under a hidden name `.NAME.….partial`, which its
process holds locked: what a killed process left is removed by the next one that writes the same output.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from aprjax.checkpoint.types import CheckpointError

# Between making a partial output and locking it there is a moment; what is younger than this is left alone.
_ABANDONED_AFTER_SECONDS = 60.0


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write that appears as `path` when the block ends, and not at all when it fails.

    A file that stood at `path` stays until then.

    Args:
        path: the file to write.
        durable: the bytes reach the disk before the name does, so that the file is whole after a power cut, too.

    Raises:
        CheckpointError: the file cannot be written (no such folder, disk full, not permitted).
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError("a folder stands where the file is to be written", file=path, fix="choose another name")
    partial = _partial_name(path)
    try:
        _remove_abandoned(path)
        with _nameless(path.parent) or partial.open("x+b") as stream:
            named = partial.exists()
            if named:
                _lock(stream.fileno())
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            if not named:
                _give_name(stream.fileno(), partial)
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
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
        _remove_abandoned(path)
        partial.mkdir()
        with _held(partial):
            yield partial
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_name(path: Path) -> Path:
    # In the target's own folder: a move across file systems would be a copy, which can stop halfway.
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")


def _nameless(folder: Path) -> BinaryIO | None:
    """A file without a name in a folder; None where the system or the file system has none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        if not _can_be_nameless(folder, folder.stat().st_dev):
            return None
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except OSError:
        return None  # opening by name says what is wrong


@lru_cache
def _can_be_nameless(folder: Path, device: int) -> bool:
    """Whether such a file can be made and named afterwards: asked once, before gigabytes are written to one."""
    del device
    probe = folder / f".{secrets.token_hex(8)}.partial"
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        _give_name(descriptor, probe)
        probe.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _give_name(descriptor: int, name: Path) -> None:
    # With a descriptor for a folder (any: the path is absolute) Python calls linkat, which follows the link in /proc.
    os.link(f"/proc/self/fd/{descriptor}", name.absolute(), src_dir_fd=descriptor, follow_symlinks=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, where folders can be opened."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks an open file or folder until it is closed, however the process ends; False where another holds it."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(path: Path) -> None:
    """Removes what processes that no longer run left of the same output."""
    name = path.name[:200]
    for found in path.parent.glob(f".{glob.escape(name)}.*.partial"):
        if not re.fullmatch(re.escape(f".{name}.") + r"[0-9a-f]{8}\.partial", found.name):
            continue
        with contextlib.suppress(OSError):
            status = found.lstat()
            regular = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
            if not regular or time.time() - status.st_mtime < _ABANDONED_AFTER_SECONDS:
                continue
            descriptor = os.open(found, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    shutil.rmtree(found, ignore_errors=True) if found.is_dir() else found.unlink()
            finally:
                os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot be written: {error.strerror or error}",
        file=path,
        fix="free some space, or choose a folder that exists and can be written to; nothing was left behind",
    )
