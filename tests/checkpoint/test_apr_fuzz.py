"""Damaged APR files: a `Checkpoint` or a `CheckpointError`, never another exception, a large allocation or a hang."""

from __future__ import annotations

import functools
import json
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from apr_drafts import draft, entries_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.checkpoint.apr_container import read_container
from aprjax.checkpoint.apr_metadata import ALIASES
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.apr_writer import write_container
from aprjax.checkpoint.types import Checkpoint, CheckpointError

# Damaged files in all, over the kinds of damage: in `make test`, and in the long suite.
CASES = int(os.environ.get("APRJAX_FUZZ_CASES", "500"))
CASES_AT_LENGTH = max(CASES, 10_000)
# The sound file is some 20 kB; reading it takes some 100 kB of Python objects. A lying header that made the reader
# allocate what it claims would take megabytes at least.
MEMORY_LIMIT = 4 << 20
TIME_LIMIT = 5.0
# From the sound file and the length of its header, metadata and index, to a damaged one.
Damage = Callable[[bytes, int], bytes]


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


def flipped(flips: list[tuple[float, int]], renew: bool) -> Damage:
    """Bytes of header, metadata and index changed."""

    def damage(content: bytes, front: int) -> bytes:
        data = bytearray(content)
        for place, bits in flips:
            data[int(place * front)] ^= bits
        return renewed(data) if renew else bytes(data)

    return damage


def header_number(at: int, width: str, value: int) -> Damage:
    """A number over some bytes of the header."""

    def damage(content: bytes, front: int) -> bytes:
        data = bytearray(content)
        struct.pack_into(f"<{width}", data, at, value % 256 ** struct.calcsize(f"<{width}"))
        return renewed(data)

    return damage


def index_number(place: float, value: int) -> Damage:
    """Eight bytes of the index overwritten."""

    def damage(content: bytes, front: int) -> bytes:
        data = bytearray(content)
        start = struct.unpack_from("<Q", data, 24)[0]
        struct.pack_into("<Q", data, start + int(place * (front - start - 8)), value)
        return bytes(data)

    return damage


PLACE = st.floats(0, 1, exclude_max=True)
ABSURD = st.sampled_from([0, 1, 63, 64, 255, 65535, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
DAMAGE: dict[str, st.SearchStrategy[Damage]] = {
    "flips": st.builds(flipped, st.lists(st.tuples(PLACE, st.integers(1, 255)), min_size=1, max_size=4), st.booleans()),
    "header": st.builds(
        header_number,
        st.sampled_from([4, 5, 6, 8, 12, 20, 24, 32, 40, 44]),
        st.sampled_from("BHIQ"),
        st.integers(0, 2**64 - 1) | ABSURD,
    ),
    "index": st.builds(index_number, PLACE, ABSURD),
    "truncation": PLACE.map(lambda share: lambda content, front: content[: max(1, int(share * len(content)))]),
    "noise": st.tuples(
        st.sampled_from([b"APR\0", b"APRN", b"APR1", b"APR2", b""]), st.binary(min_size=1, max_size=300)
    ).map(lambda parts: lambda content, front: parts[0] + parts[1]),
}


KEYS = st.sampled_from(
    [key for canonical, aliases in ALIASES.items() for key in (canonical, *aliases)]
    + [key for key in draft().metadata if key not in ALIASES]
    + [
        "eps",
        "format",
        "quantization",
        "tied_embeddings",
        "tokenizer.chat_template",
        "tokenizer.token_type",
        "model_type",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["2", "qwen2", "nan", "1e400", "<|im_start|>", "a b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def run_many(folder: Path, kind: str, cases: int) -> None:
    @settings(
        max_examples=max(1, cases // len(DAMAGE)), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damage=DAMAGE[kind])
    def run(damage: Damage) -> None:
        survives(folder, damage(sound(folder), front(folder)))

    run()


@settings(max_examples=max(1, CASES // 2), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), drop=st.sets(KEYS, max_size=3))
def test_metadata_of_any_kind(folder: Path, changes: dict[str, object], drop: set[str]) -> None:
    changed = draft()
    metadata = {key: value for key, value in changed.metadata.items() if key not in drop} | changes
    path = folder / "metadata.apr"
    with path.open("wb") as stream:
        write_container(stream, metadata=json.dumps(metadata).encode(), entries=entries_of(changed))
    survives(folder, path.read_bytes())


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(folder: Path, kind: str) -> None:
    run_many(folder, kind, CASES)


# Needs no model, but takes minutes: part of `make test-real` for its length.
@pytest.mark.real_model
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_at_length(folder: Path, kind: str) -> None:
    run_many(folder, kind, CASES_AT_LENGTH)


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
