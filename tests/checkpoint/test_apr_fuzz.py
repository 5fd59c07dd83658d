"""Damaged APR files: a `Checkpoint` or a `CheckpointError`, never another exception, a large allocation or a hang."""

from __future__ import annotations

import functools
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from apr_drafts import draft
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.checkpoint.apr_container import read_container
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.types import Checkpoint, CheckpointError

# In all, over the five generated tests; the long suite sets 10,000.
CASES = int(os.environ.get("APRJAX_FUZZ_CASES", "500"))
# The sound file is some 20 kB; reading it takes some 100 kB of Python objects. A lying header that made the reader
# allocate what it claims would take megabytes at least.
MEMORY_LIMIT = 4 << 20
TIME_LIMIT = 5.0
fuzz = settings(
    max_examples=max(1, CASES // 5),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@functools.cache
def sound(folder: Path) -> bytes:
    return draft().write(folder / "sound.apr").read_bytes()


@functools.cache
def front(folder: Path) -> int:
    """Length of header, metadata and index."""
    sound(folder)
    return read_container(folder / "sound.apr").header.data_offset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def survives(folder: Path, data: bytes) -> None:
    path = folder / "damaged.apr"
    path.write_bytes(data)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        outcome = outcome_of(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT
    assert time.perf_counter() - start < TIME_LIMIT
    if isinstance(outcome, CheckpointError):
        assert outcome.file == str(path)
        assert outcome.message
    else:
        assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in outcome.tensors.values())


def outcome_of(path: Path) -> Checkpoint | CheckpointError:
    try:
        return read_apr(path)
    except CheckpointError as error:
        return error


def renewed(data: bytearray) -> bytes:
    """The file with a right header checksum, so that damage goes deeper than that check."""
    data[40:44] = struct.pack("<I", zlib.crc32(bytes(data[44:64]), zlib.crc32(bytes(data[:40]))))
    return bytes(data)


@fuzz
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    renew=st.booleans(),
)
def test_flipped_bytes_in_header_metadata_and_index(folder: Path, flips: list[tuple[float, int]], renew: bool) -> None:
    data = bytearray(sound(folder))
    for place, bits in flips:
        data[int(place * front(folder))] ^= bits
    survives(folder, renewed(data) if renew else bytes(data))


@fuzz
@given(
    at=st.sampled_from([4, 5, 6, 8, 12, 20, 24, 32, 40, 44]),
    width=st.sampled_from(["B", "H", "I", "Q"]),
    value=st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 63, 64, 2**31, 2**32 - 1, 2**63, 2**64 - 1]),
)
def test_absurd_numbers_in_the_header(folder: Path, at: int, width: str, value: int) -> None:
    data = bytearray(sound(folder))
    size = struct.calcsize(f"<{width}")
    struct.pack_into(f"<{width}", data, at, value % 256**size)
    survives(folder, renewed(data))


@fuzz
@given(
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from([0, 1, 255, 65535, 2**32 - 1, 2**62, 2**63, 2**64 - 1]),
)
def test_absurd_numbers_in_the_index(folder: Path, place: float, value: int) -> None:
    data = bytearray(sound(folder))
    start = struct.unpack_from("<Q", data, 24)[0]
    at = start + int(place * (front(folder) - start - 8))
    struct.pack_into("<Q", data, at, value)
    survives(folder, bytes(data))


@fuzz
@given(length=st.floats(0, 1))
def test_truncation_anywhere(folder: Path, length: float) -> None:
    data = sound(folder)
    survives(folder, data[: max(1, int(length * len(data)))])


@fuzz
@given(data=st.binary(min_size=1, max_size=300), magic=st.sampled_from([b"APR\0", b"APRN", b"APR1", b"APR2", b""]))
def test_noise_behind_a_magic(folder: Path, data: bytes, magic: bytes) -> None:
    survives(folder, magic + data)


def test_truncation_at_every_section_boundary(folder: Path) -> None:
    data = sound(folder)
    container = read_container(folder / "sound.apr")
    header = container.header
    boundaries = {0, 4, 8, 64, 64 + header.metadata_size, header.index_offset, header.data_offset, len(data)}
    boundaries |= {entry.position for entry in container.entries}
    boundaries |= {header.data_offset + entry.offset for entry in container.entries}
    boundaries |= {header.data_offset + entry.offset + entry.size for entry in container.entries}
    for boundary in boundaries:
        for length in (boundary - 1, boundary, boundary + 1):
            if 1 <= length < len(data):
                survives(folder, data[:length])


@pytest.mark.parametrize("flag", [1, 2])
def test_noise_in_compressed_files(folder: Path, flag: int) -> None:
    data = bytearray(sound(folder))
    data[6] |= flag
    for start in (64, 65, 70):
        damaged = bytearray(renewed(data))
        damaged[start:] = os.urandom(3000)
        survives(folder, bytes(damaged))


@pytest.mark.parametrize("number", [2**31, 2**63, 10**400, -1, 1.5e308])
def test_absurd_dimensions_in_the_metadata(folder: Path, number: float) -> None:
    for key in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "vocab_size",
        "head_dim",
        "intermediate_size",
    ):
        changed = draft()
        changed.metadata[key] = number
        survives(folder, changed.write(folder / "absurd.apr").read_bytes())
