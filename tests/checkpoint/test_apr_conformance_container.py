"""Conformance cases 1 to 10 of apr-format.md 10: the container."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from apr_drafts import Part, compact, draft, f32, finding_ids, patch_header

from aprjax.checkpoint.apr_container import read_container, verify_footer
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.apr_writer import RawEntry, write_container
from aprjax.checkpoint.types import CheckpointError

DATA = Path(__file__).parent / "data"
GOLDEN_ENTRIES = [
    RawEntry("bias", 0, (1,), 4, lambda: (f32(np.array([0.125])),)),
    RawEntry("weights", 0, (8,), 32, lambda: (f32(np.array([1, 2, 0.5, -0.5, 4, -2, 0.25, 8])),)),
]


@pytest.mark.parametrize(
    ("sample", "size"), [("reconstructed_golden_v2_current.apr", 516), ("reconstructed_golden_v2_nulls.apr", 1092)]
)
def test_case_01_golden_files_are_reproduced_byte_for_byte(tmp_path: Path, sample: str, size: int) -> None:
    golden = read_container(DATA / sample, verify=True)
    assert [entry.name for entry in golden.entries] == ["bias", "weights"]
    assert golden.metadata["param_count"] == 8
    assert golden.tensor_bytes(golden.entries[1]).tobytes() == GOLDEN_ENTRIES[1].chunks()[0]  # type: ignore[index]
    assert golden.log.all() == ()
    target = tmp_path / "golden.apr"
    with target.open("wb") as stream:
        write_container(stream, metadata=golden.metadata, entries=GOLDEN_ENTRIES)
    assert target.stat().st_size == size
    assert target.read_bytes() == (DATA / sample).read_bytes()


def test_case_01_a_golden_file_is_no_language_model() -> None:
    with pytest.raises(CheckpointError, match="no architecture"):
        read_apr(DATA / "reconstructed_golden_v2_current.apr")


def test_case_02_header_checksum(tmp_path: Path) -> None:
    sound = draft().read(tmp_path / "sound.apr")
    assert finding_ids(sound) == set()
    assert finding_ids(draft().read(tmp_path / "zero.apr", header_checksum=0)) == {"apr-header-crc-zero"}
    wrong = draft().read(tmp_path / "wrong.apr", header_checksum=12345)
    assert finding_ids(wrong) == {"apr-header-crc-wrong"}
    assert wrong.findings[0].offset == 40


def test_case_03_footer_missing_or_wrong(tmp_path: Path) -> None:
    assert finding_ids(draft().read(tmp_path / "none.apr", footer=False)) == {"apr-footer-missing"}
    path = draft().write(tmp_path / "wrong.apr")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert finding_ids(read_apr(path)) == set(), "opening does not read the whole file"
    assert finding_ids(read_apr(path, verify=True)) == {"apr-footer-crc-wrong"}
    done: list[int] = []
    assert not verify_footer(read_container(path), done.append)
    assert sum(done) == path.stat().st_size - 4


def test_case_03_a_flipped_bit_in_the_data_is_seen_by_the_footer(tmp_path: Path) -> None:
    path = draft().write(tmp_path / "flipped.apr")
    assert finding_ids(read_apr(path, verify=True)) == set()
    data = bytearray(path.read_bytes())
    data[-200] ^= 4
    path.write_bytes(data)
    assert finding_ids(read_apr(path, verify=True)) == {"apr-footer-crc-wrong"}


def test_case_04_unsorted_index(tmp_path: Path) -> None:
    shuffled = draft()
    shuffled.tensors = dict(reversed(shuffled.tensors.items()))
    checkpoint = shuffled.read(tmp_path / "unsorted.apr", sort=False)
    assert finding_ids(checkpoint) == {"apr-index-unsorted"}
    assert len(checkpoint.tensors) == len(shuffled.tensors)


def test_case_04_names_are_sorted_by_bytes(tmp_path: Path) -> None:
    names = ["layers.2", "layers.10"]
    path = tmp_path / "order.apr"
    with path.open("wb") as stream:
        write_container(stream, metadata={}, entries=[RawEntry(n, 0, (1,), 4, lambda: (b"\0\0\0\0",)) for n in names])
    container = read_container(path)
    assert [entry.name for entry in container.entries] == ["layers.10", "layers.2"]
    assert container.log.all() == ()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(0x0400, set()), (0, {"apr-layout-flag-absent"}), (0x8400, {"apr-flags-unknown"}), (0x0410, {"apr-sharded"})],
)
def test_case_05_flags(tmp_path: Path, flags: int, expected: set[str]) -> None:
    assert finding_ids(draft().read(tmp_path / "flags.apr", flags=flags)) == expected


@pytest.mark.parametrize(("flags", "named"), [(0x0800, "LAYOUT-002"), (0x0404, "encrypted")])
def test_case_05_refused_flags(tmp_path: Path, flags: int, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        draft().read(tmp_path / "flags.apr", flags=flags)
    assert caught.value.file == str(tmp_path / "flags.apr")
    assert caught.value.offset == 6


OTHER_CONTAINERS = {
    "APR1 B": (b"APR1" + struct.pack("<I", 20) + b'{"name":"x","y":[1]}' + bytes(60), "serialization::apr"),
    "APR1 C": (b"APR1" + struct.pack("<HBBBHB", 1, 0, 0, 0, 3, 1) + struct.pack("<10I", *range(10)), "whisper"),
    "APR2": (b"APR2\x01" + struct.pack("<I", 100) + bytes(90), "APR2"),
    "wrapper LZ4": (b"APR\0\x01" + struct.pack("<I", 5000) + bytes(range(100)), "LZ4-compressed wrapper"),
    "wrapper zstd": (
        b"APR\0\x02" + struct.pack("<I", 5000) + b"\x28\xb5\x2f\xfd" + bytes(range(100)),
        "zstd-compressed wrapper",
    ),
    "version E": (b"APR\0" + struct.pack("<8Iff", 1, 64, 2, 4, 4, 100, 128, 512, 1e4, 1e-6) + bytes(99), "APR Transf"),
    "cookbook": (b"APRN" + bytes([9, 9]) + bytes(64), "cookbook"),
}


@pytest.mark.parametrize("case", OTHER_CONTAINERS)
def test_case_06_other_containers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, named = OTHER_CONTAINERS[case]
    path = tmp_path / "other.apr"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=named):
        read_apr(path)


def test_case_06_a_real_aprn_file_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"classic .* model of aprender"):
        read_apr(DATA / "realizar_mnist_784x2_v1_APRN.apr")


def test_case_06_container_f_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "f.apr"
    metadata = compact({"architecture": "qwen2", "intermediate_dim": 12, "context_length": 64, "eps": 1e-6})
    index = b'[{"name":"weights","dtype":"json","shape":[2],"offset":0,"size":2}]'
    draft().write(path)
    head = bytearray(path.read_bytes()[:64])
    at = 64 + -(-len(metadata) // 64) * 64
    struct.pack_into("<IQIQQ", head, 8, 1, 64, len(metadata), at, at + 128)
    head[40:44] = struct.pack("<I", zlib.crc32(bytes(head[44:64]), zlib.crc32(bytes(head[:40]))))
    path.write_bytes((bytes(head) + metadata).ljust(at, b"\0") + index.ljust(128, b"\0") + b"{}")
    with pytest.raises(CheckpointError, match="GgufToAprConverter"):
        read_apr(path)


def test_case_07_streaming_writer_order_is_read_by_offset(tmp_path: Path) -> None:
    sound = draft()
    expected = sound.read(tmp_path / "sound.apr")
    position, offsets = 0, {}
    for name in reversed(sorted(sound.tensors)):
        offsets[name] = position
        position += -(-len(sound.tensors[name].data) // 64) * 64
    # Data in reverse order behind an index in sorted order, as the streaming writer leaves them.
    backwards = draft()
    ordered = sorted(backwards.tensors)
    lying = dict(zip(ordered, reversed(ordered), strict=True))
    backwards.tensors = {
        name: Part(0, sound.tensors[name].shape, sound.tensors[name].data, offsets[name]) for name in ordered
    }
    path = backwards.write(tmp_path / "backwards.apr")
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<Q", data, 32)[0]
    body = b"".join(
        sound.tensors[lying[name]].data.ljust(-(-len(sound.tensors[lying[name]].data) // 64) * 64, b"\0")
        for name in ordered
    )
    data[start : start + len(body)] = body
    path.write_bytes(data)
    checkpoint = read_apr(path)
    assert finding_ids(checkpoint) == {"apr-offsets-not-monotonic"}
    for name, tensor in expected.tensors.items():
        assert checkpoint.tensors[name].data.tobytes() == tensor.data.tobytes()


def test_case_07_container_g_unaligned_data(tmp_path: Path) -> None:
    checkpoint = draft().read(tmp_path / "g.apr", data_shift=20, flags=0, header_checksum=0, footer=False)
    assert finding_ids(checkpoint) == {
        "apr-data-unaligned",
        "apr-header-crc-zero",
        "apr-layout-flag-absent",
        "apr-footer-missing",
    }
    name = "model.layers.1.mlp.up_proj.weight"
    assert checkpoint.tensors[name].data.tobytes() == draft().tensors[name].data


def test_case_08_truncation(tmp_path: Path) -> None:
    path = draft().write(tmp_path / "cut.apr")
    data = path.read_bytes()
    container = read_container(path)
    path.write_bytes(data[: container.end_of_data - 1])
    with pytest.raises(CheckpointError, match=r"1 bytes are missing.*#2564") as caught:
        read_apr(path)
    assert caught.value.tensor == "model.norm.weight"
    path.write_bytes(data[: container.end_of_data + 3])
    assert finding_ids(read_apr(path)) == {"apr-footer-missing"}
    path.write_bytes(data[:-1])
    assert finding_ids(read_apr(path)) == {"apr-footer-missing"}
    path.write_bytes(data + b"more")
    assert finding_ids(read_apr(path)) == {"apr-trailing-bytes"}


@pytest.mark.parametrize("length", [1, 3, 4, 10, 63, 64, 100])
def test_case_08_cut_in_header_or_metadata(tmp_path: Path, length: int) -> None:
    path = draft().write(tmp_path / "cut.apr")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        read_apr(path)


def _compressed(path: Path, blob: bytes, flag: int) -> Path:
    patch_header(path, 6, struct.pack("<H", 0x0400 | flag))
    path.write_bytes(path.read_bytes()[:64] + blob)
    return path


def test_case_09_lz4_blob(tmp_path: Path) -> None:
    block = pytest.importorskip("lz4.block", reason="the optional package lz4 is not installed")
    path = draft().write(tmp_path / "lz4.apr")
    body = path.read_bytes()[64:]
    _compressed(path, struct.pack("<I", len(body)) + block.compress(body, store_size=False), 1)
    checkpoint = read_apr(path)
    assert finding_ids(checkpoint) == {"apr-compressed"}
    name = "model.embed_tokens.weight"
    assert checkpoint.tensors[name].data.tobytes() == draft().tensors[name].data


def test_case_09_lz4_block_that_claims_too_much(tmp_path: Path) -> None:
    pytest.importorskip("lz4.block", reason="the optional package lz4 is not installed")
    path = _compressed(draft().write(tmp_path / "lz4.apr"), struct.pack("<I", 2**32 - 1) + bytes(1000), 1)
    with pytest.raises(CheckpointError, match="claims to hold 4294967295"):
        read_apr(path)


def test_case_09_zstd_blob(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the optional package zstandard is not installed")
    path = draft().write(tmp_path / "zstd.apr")
    body = path.read_bytes()[64:]
    _compressed(path, zstandard.compress(body), 2)
    assert finding_ids(read_apr(path)) == {"apr-compressed"}
    bomb = zstandard.compress(bytes(50_000_000))
    _compressed(path, bomb, 2)
    with pytest.raises(CheckpointError, match="unpacks to more than"):
        read_apr(path)


@pytest.mark.parametrize(("flag", "package"), [(1, "lz4"), (2, "zstandard")])
def test_case_09_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, package: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.block", None)
    path = _compressed(draft().write(tmp_path / "packed.apr"), bytes(range(200)), flag)
    with pytest.raises(CheckpointError, match=f"pip install {package}"):
        read_apr(path)


@pytest.mark.parametrize("flag", [1, 2])
def test_case_09_flag_without_compression(tmp_path: Path, flag: int) -> None:
    checkpoint = draft().read(tmp_path / "untrue.apr", flags=0x0400 | flag)
    assert finding_ids(checkpoint) == {"apr-compression-flag-untrue"}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("", (2,), {"apr-name-length", "unexpected-tensor"}),
        ("n" * 256, (2,), {"unexpected-tensor"}),
        ("n" * 300, (2,), {"apr-name-length", "unexpected-tensor"}),
        ("größe.層", (2,), {"unexpected-tensor"}),
        ("scalar", (), {"unexpected-tensor"}),
        ("eight", (1,) * 8, {"unexpected-tensor"}),
        ("nine", (1,) * 9, {"apr-rank", "unexpected-tensor"}),
        ("empty", (0, 7), {"unexpected-tensor"}),
    ],
)
def test_case_10_names_ranks_and_sizes(tmp_path: Path, name: str, shape: tuple[int, ...], expected: set[str]) -> None:
    with_extra = draft()
    elements = int(np.prod(shape))
    with_extra.tensors[name] = Part(0, shape, bytes(4 * elements))
    checkpoint = with_extra.read(tmp_path / "extra.apr")
    assert finding_ids(checkpoint) == expected
    assert checkpoint.tensors[name].shape == shape
    assert checkpoint.tensors[name].decode().shape == shape


def test_case_10_rank_beyond_any_array(tmp_path: Path) -> None:
    with_extra = draft()
    with_extra.tensors["deep"] = Part(0, (1,) * 200, bytes(4))
    with pytest.raises(CheckpointError, match="rank 200"):
        with_extra.read(tmp_path / "deep.apr")


def test_case_10_duplicate_names(tmp_path: Path) -> None:
    once = draft()
    name = "model.norm.weight"
    entries = [RawEntry(n, p.dtype, p.shape, len(p.data), lambda p=p: (p.data,)) for n, p in once.tensors.items()]
    entries.append(RawEntry(name, 0, (8,), 32, lambda: (f32(np.full(8, 7.0)),)))
    path = tmp_path / "twice.apr"
    with path.open("wb") as stream:
        write_container(stream, metadata=once.metadata, entries=entries)
    checkpoint = read_apr(path)
    assert finding_ids(checkpoint) == {"apr-duplicate-name"}
    assert (checkpoint.tensors[name].decode() == 7).all(), "the last entry counts"
