"""Mapped files: read when touched, let go on request."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from aprjax.checkpoint.mapped_file import map_file, release_pages


def resident(name: str) -> int:
    """Kilobytes of file pages that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the proof reads Linux's /proc")
def test_released_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    mapped = map_file(tmp_path / "file")
    view = mapped[1000 : 50 << 20]
    assert np.array_equal(view, content[1000 : 50 << 20])
    before = resident("RssFile")
    release_pages(view)
    # Of the 50 MiB at least 48 go; the rest is slack for other mappings of the process.
    assert before - resident("RssFile") > 48 << 10
    assert np.array_equal(view, content[1000 : 50 << 20])


def test_other_memory_is_left_alone() -> None:
    array = np.arange(3 * mmap.PAGESIZE, dtype=np.uint8)
    release_pages(array[10:])
    assert np.array_equal(array, np.arange(3 * mmap.PAGESIZE, dtype=np.uint8))
