"""A file as read-only bytes in memory, without reading it."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from aprjax.checkpoint.types import CheckpointError


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Map a regular file into memory.

    Args:
        path: the file.

    Returns:
        `uint8[bytes]`, read-only. Views of it keep the mapping alive; pages are read when touched.

    Raises:
        CheckpointError: there is no such file, it cannot be read, is empty, or is no regular file
            (a directory, or a pipe, which would block).
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a pipe must not wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"cannot be opened: {reason}", file=path, fix="check the path") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("expected a regular file", file=path, fix="give the path of a model file")
        if status.st_size == 0:
            raise CheckpointError("the file is empty", file=path, offset=0, fix="download or convert it again")
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot be mapped into memory: {error.strerror}", file=path) from error
    finally:
        os.close(descriptor)
    return np.frombuffer(mapping, dtype=np.uint8)


def release_pages(view: np.ndarray) -> None:
    """Lets go of the physical memory behind a view of a mapped file; touching it again reads it again.

    A process that has compared two files of a gigabyte would otherwise be counted as holding both. A view
    of anything but a mapped file is left alone, and so is everything on a system without `madvise`.
    """
    owner = view
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base.obj if isinstance(owner.base, memoryview) else owner.base
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = view.ctypes.data - np.frombuffer(owner, dtype=np.uint8).ctypes.data
    # Whole pages within the view only: the neighbours' bytes stay.
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        owner.madvise(mmap.MADV_DONTNEED, first, length)
