"""Damaged GGUF files: a checkpoint or a message, never anything else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzing import damages, open_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import TINY, tiny_tensors, write_tiny_gguf

from aprjax.checkpoint import Checkpoint
from aprjax.checkpoint.gguf_format import parse_header
from aprjax.checkpoint.gguf_reader import read_gguf
from aprjax.checkpoint.mapped_file import map_file

SMALL = replace(TINY, hidden_size=32, num_layers=1, head_dim=8, intermediate_size=64)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 60 kB."""
    path = tmp_path_factory.mktemp("fuzz") / "sound.gguf"
    return write_tiny_gguf(path, tiny_tensors(SMALL, matrix="Q8_0"), config=SMALL)


def header_bytes(path: Path) -> int:
    return parse_header(map_file(path), path).data_offset


def damage_many(sound: Path, examples: int) -> None:
    """Open `examples` damaged files; both ends must occur, or the damage was not worth its name."""
    content, header = sound.read_bytes(), header_bytes(sound)
    path = sound.with_name("damaged.gguf")
    ends: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damage=damages(header, len(content)))
    def run(damage: object) -> None:
        ends[type(open_damaged(path, damage(content))).__name__] += 1  # type: ignore[operator]

    run()
    assert ends["Checkpoint"] > 0
    assert ends["CheckpointError"] > examples // 10


def test_damaged_headers(sound: Path) -> None:
    damage_many(sound, 500)


# Needs no model, but takes minutes: part of `make test-real` for its length.
@pytest.mark.real_model
def test_damaged_headers_at_length(sound: Path) -> None:
    damage_many(sound, 10_000)


def test_truncation_at_every_boundary(sound: Path) -> None:
    content = sound.read_bytes()
    path = sound.with_name("truncated.gguf")
    header = parse_header(map_file(sound), sound)
    boundaries = {0, 1, 3, 4, 8, 16, 24, header.data_offset, len(content) - 1}
    boundaries |= set(header.metadata.offsets.values()) | {info.entry_offset for info in header.tensors}
    boundaries |= {header.data_offset + info.offset for info in header.tensors}
    assert len(boundaries) > 50
    # Behind the last weight only padding is left to lose.
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(sound).tensors.values())
    for boundary in boundaries:
        for length in {max(boundary - 1, 0), boundary, boundary + 1}:
            if length >= len(content):
                continue
            result = open_damaged(path, content[:length])
            if length >= end:
                assert isinstance(result, Checkpoint)
                assert [finding.id for finding in result.findings] == ["gguf-end-unpadded"]
            else:
                assert not isinstance(result, Checkpoint), length


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(content=st.binary(max_size=400), magic=st.booleans())
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    head = b"GGUF\x03\0\0\0" if magic else b""
    assert not isinstance(open_damaged(path, head + content), Checkpoint)


def test_a_huge_file_of_zeros_allocates_nothing(tmp_path: Path) -> None:
    """A sparse file has all the bytes that a lying count asks for; the limits must hold without the file's help."""
    import struct
    import time
    import tracemalloc

    from aprjax.checkpoint import CheckpointError, open_checkpoint

    path = tmp_path / "zeros.gguf"
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 30)
    for head, message in (
        (struct.pack("<IQQ", 3, 1 << 20, 1 << 20), "stands twice"),
        (struct.pack("<IQQ", 3, 1 << 20, 0), "dimensions"),
        (struct.pack("<IQQ", 3, 1, 1) + entry, "the limit is 4194304"),
    ):
        with path.open("wb") as stream:
            stream.write(b"GGUF" + head)
            stream.truncate(16 << 30)
        start = time.perf_counter()
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.stop()
        assert time.perf_counter() - start < 1
