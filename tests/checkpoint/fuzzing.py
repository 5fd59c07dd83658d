"""Damage to files, and what opening a damaged file may end in."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st

from aprjax.checkpoint import Checkpoint, CheckpointError, open_checkpoint

# Counts and lengths that overflow, wrap, or ask for more memory than there is.
ABSURD = (0, 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
# What opening a file of `size` bytes may allocate: a Python string takes some 50 bytes beside its text, and the
# shortest string in a file takes 8, so a small multiple of the file is honest; 2 MiB cover imports and buffers.
BYTES_PER_BYTE, BYTES_ALWAYS = 24, 2 << 20
# Of this thread's processor time, which other work on the machine and in this process does not count in. Opening a tiny
# file takes milliseconds; a second means that a length was believed.
SECONDS = 1.0

Damage = Callable[[bytes], bytes]


def damages(header: int, size: int) -> st.SearchStrategy[Damage]:
    """Byte flips and absurd numbers within the first `header` bytes, and truncation anywhere."""
    flips = st.lists(st.tuples(st.integers(0, header - 1), st.integers(1, 255)), min_size=1, max_size=8)
    absurd = st.tuples(st.integers(0, header - 8), st.sampled_from(ABSURD), st.sampled_from((4, 8)))
    return st.one_of(
        flips.map(lambda changes: lambda content: flipped(content, changes)),
        absurd.map(lambda change: lambda content: overwritten(content, *change)),
        st.tuples(flips, absurd).map(lambda both: lambda content: overwritten(flipped(content, both[0]), *both[1])),
        st.integers(0, size - 1).map(lambda length: lambda content: content[:length]),
    )


def flipped(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Some bytes changed (each by an XOR that is not zero)."""
    damaged = bytearray(content)
    for position, change in changes:
        damaged[position] ^= change
    return bytes(damaged)


def overwritten(content: bytes, position: int, number: int, width: int) -> bytes:
    """A little-endian number put over some bytes."""
    raw = (number % 2 ** (8 * width)).to_bytes(width, "little")
    return content[:position] + raw + content[position + width :]


def open_damaged(path: Path, content: bytes, *, opened: Path | None = None) -> Checkpoint | CheckpointError:
    """Write the content and open it; fails on any other end than a checkpoint or a message with file, offset and fix.

    Args:
        path: the file to write.
        content: its bytes.
        opened: what to open, if not `path` itself.
    """
    path.write_bytes(content)
    # What hundreds of tests before have left in this process takes its collector long to walk through: not opening's.
    gc.disable()
    start = time.thread_time()
    tracemalloc.start()
    try:
        result: Checkpoint | CheckpointError = open_checkpoint(opened or path)
    except CheckpointError as error:
        result = error
    finally:
        seconds = time.thread_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
    assert seconds < SECONDS
    assert peak <= BYTES_ALWAYS + BYTES_PER_BYTE * len(content)
    if isinstance(result, CheckpointError):
        assert result.file is not None
        assert Path(result.file).exists()
        assert result.offset is not None, str(result)
        assert 0 <= result.offset <= 2**64
        assert result.fix
    else:
        # Every view lies in the file.
        for tensor in result.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(content)
            int(tensor.data.sum(dtype="uint64"))
    return result
