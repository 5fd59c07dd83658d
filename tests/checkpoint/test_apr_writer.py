"""Writing APR files: what `write_apr` emits, refuses and leaves behind."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apr_drafts import TINY, WIDE, draft, finding_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.blocks import byte_size
from aprjax.checkpoint.apr_metadata import ALIASES
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.apr_writer import STRUCT_ORDER, write_apr
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor, Vocabulary

VOCABULARY = Vocabulary(
    tokens=("a", "b", "ab", "<|im_start|>", *(f"t{i}" for i in range(16))),
    merges=("a b",),
    token_types=(1,) * 3 + (3,) + (1,) * 16,
    bos_token_id=3,
    eos_token_id=3,
    padding_token_id=0,
    add_bos=False,
    pre_tokenizer="qwen2",
    model="gpt2",
)


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return draft().read(tmp_path / "source.apr")


def write(path: Path, source: Checkpoint, **changes: Any) -> Checkpoint:
    arguments: dict[str, Any] = {
        "config": source.config,
        "tensors": list(source.tensors.values()),
        "vocabulary": VOCABULARY,
        "chat_template": "{{ x }}",
    }
    write_apr(path, **arguments | changes)
    return read_apr(path, verify=True)


def test_everything_comes_back(tmp_path: Path, source: Checkpoint) -> None:
    written = write(tmp_path / "a.apr", source)
    assert finding_ids(written) == set()
    assert written.config == source.config
    assert written.vocabulary == VOCABULARY
    assert written.chat_template == "{{ x }}"
    assert {name: t.data.tobytes() for name, t in written.tensors.items()} == {
        name: t.data.tobytes() for name, t in source.tensors.items()
    }


def test_the_file_by_its_bytes(tmp_path: Path, source: Checkpoint) -> None:
    # Parsed here with struct alone, after apr-format.md 1.2 and 3.
    write(tmp_path / "a.apr", source, source_metadata={"general.name": "x"}, tied_embeddings=True)
    data = (tmp_path / "a.apr").read_bytes()
    magic, major, minor, flags, count, metadata_at, size, index_at, data_at, crc = struct.unpack_from(
        "<4sBBHIQIQQI", data
    )
    assert (magic, major, minor, flags, metadata_at) == (b"APR\0", 2, 0, 0x0400, 64)
    assert crc == zlib.crc32(data[:40] + data[44:64])
    assert index_at % 64 == data_at % 64 == 0
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    metadata = json.loads(data[64 : 64 + size])
    struct_keys = [key for key in metadata if key in STRUCT_ORDER]
    assert struct_keys == [key for key in STRUCT_ORDER if key in metadata]
    assert list(metadata)[: len(struct_keys)] == struct_keys
    assert [key for key, value in metadata.items() if value is None] == ["license", "data_source", "data_license"]
    aliases = {alias for names in ALIASES.values() for alias in names}
    assert not aliases & set(metadata)
    assert metadata["rope_type"] == 2
    assert metadata["chat_template"] == metadata["tokenizer.chat_template"]
    assert metadata["tensor_shapes"]["lm_head.weight"] == [20, 8]
    assert metadata["source_metadata"] == {"general.name": "x"}
    assert metadata["tied_embeddings"] is True
    assert metadata["tokenizer.token_type"] == list(VOCABULARY.token_types)
    names, cursor, end = [], index_at, 0
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, cursor)
        names.append(data[cursor + 2 : cursor + 2 + length])
        dtype, rank = struct.unpack_from("<BB", data, cursor + 2 + length)
        cursor += 4 + length + 8 * rank
        offset, nbytes = struct.unpack_from("<QQ", data, cursor)
        assert (dtype, offset % 64, offset >= end) == (0, 0, True)
        cursor, end = cursor + 16, offset + nbytes
    assert names == sorted(names)
    assert len(data) == data_at + -(-end // 64) * 64 + 4


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, source: Checkpoint) -> None:
    write(tmp_path / "a.apr", source)
    write(tmp_path / "b.apr", source, tensors=list(reversed(source.tensors.values())))
    assert (tmp_path / "a.apr").read_bytes() == (tmp_path / "b.apr").read_bytes()


def test_float32_constants_are_written_short(tmp_path: Path, source: Checkpoint) -> None:
    config = replace(source.config, rms_norm_eps=1e-06, rope_theta=1e6, rope_pairing="norm")
    written = write(tmp_path / "a.apr", source, config=config)
    assert b'"rms_norm_eps":1e-06,' in (tmp_path / "a.apr").read_bytes()
    assert written.metadata["rope_type"] == 0
    assert finding_ids(written) == {"apr-rope-type-wrong"}


@dataclass(frozen=True)
class Chunked:
    """A tensor that is made in pieces."""

    name: str
    shape: tuple[int, ...]
    block_type: str
    pieces: tuple[bytes, ...]

    @property
    def data(self) -> np.ndarray:
        raise AssertionError("the pieces are there to be used")

    def chunks(self) -> Iterator[bytes]:
        yield from self.pieces


def test_tensors_may_come_in_chunks(tmp_path: Path, source: Checkpoint) -> None:
    head = source.tensors["lm_head.weight"]
    data = head.data.tobytes()
    tensors = [tensor for name, tensor in source.tensors.items() if name != head.name]
    chunked = Chunked(head.name, head.shape, "F32", (data[:10], b"", data[10:]))
    seen: list[int] = []
    written = write(tmp_path / "a.apr", source, tensors=[*tensors, chunked], progress=seen.append)
    assert written.tensors[head.name].data.tobytes() == data
    assert sum(seen) == sum(tensor.nbytes for tensor in source.tensors.values())


def test_a_source_that_gives_too_little_leaves_no_file(tmp_path: Path, source: Checkpoint) -> None:
    tensors = [tensor for name, tensor in source.tensors.items() if name != "lm_head.weight"]
    target = tmp_path / "a.apr"
    target.write_bytes(b"what was there")
    with pytest.raises(CheckpointError, match="was to have 640 bytes"):
        write(target, source, tensors=[*tensors, Chunked("lm_head.weight", (20, 8), "F32", (b"short",))])
    assert target.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.apr", "source.apr"]


def tensor(name: str, shape: tuple[int, ...], block_type: str) -> EncodedTensor:
    return EncodedTensor(name, shape, block_type, np.zeros(byte_size(block_type, shape), np.uint8))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (tensor("x", (2, 32), "Q8_0"), "Q8_0 has no dtype byte"),
        (tensor("x", (2, 32), "AprQ4"), "AprQ4 has no dtype byte"),
        (tensor("x", (2, 896), "Q4_K"), "no whole blocks"),
        (tensor("n" * 257, (2,), "F32"), "257"),
        (tensor("", (2,), "F32"), "this name has 0"),
        (tensor("x", (1,) * 9, "F32"), "rank 9"),
        (tensor("lm_head.weight", (20, 8), "F32"), "two tensors"),
    ],
)
def test_what_real_readers_cannot_read_is_refused(
    tmp_path: Path, source: Checkpoint, extra: EncodedTensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "a.apr", source, tensors=[*source.tensors.values(), extra])
    assert not (tmp_path / "a.apr").exists()


def test_own_types_are_written_on_demand(tmp_path: Path, source: Checkpoint) -> None:
    extras = [tensor("x", (2, 32), "AprQ4"), tensor("y", (5,), "AprQ8"), tensor("z", (2, 896), "Q4_K")]
    written = write(tmp_path / "a.apr", source, tensors=[*source.tensors.values(), *extras], allow_any_type=True)
    assert [written.tensors[name].block_type for name in "xyz"] == ["AprQ4", "AprQ8", "Q4_K"]


def test_a_missing_head_is_refused(tmp_path: Path, source: Checkpoint) -> None:
    tensors = [tensor for name, tensor in source.tensors.items() if name != "lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        write(tmp_path / "a.apr", source, tensors=tensors)


@pytest.mark.parametrize("alias", ["num_hidden_layers", "n_embd", "context_length"])
def test_poison_is_not_written(tmp_path: Path, source: Checkpoint, alias: str) -> None:
    with pytest.raises(CheckpointError, match="another spelling"):
        write(tmp_path / "a.apr", source, extra_metadata={alias: None})


def test_metadata_that_is_no_json_is_refused(tmp_path: Path, source: Checkpoint) -> None:
    for value in (float("nan"), {1, 2}):
        with pytest.raises(CheckpointError, match="cannot be written as JSON"):
            write(tmp_path / "a.apr", source, extra_metadata={"custom": value})
    assert not (tmp_path / "a.apr").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, source: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "nowhere" / "a.apr", source)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([(2, 1, 4), (4, 2, 2), (3, 3, 4)]),
    layers=st.integers(1, 3),
    theta=st.floats(1, 1e8, width=32),
    eps=st.sampled_from([1e-6, 1e-5, 3e-7]),
    pairing=st.sampled_from(["neox", "norm"]),
    tokens=st.lists(TEXT, min_size=1, max_size=20, unique=True),
    template=st.none() | TEXT,
    custom=st.dictionaries(TEXT.map(lambda key: f"custom.{key}"), JSON, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_round_trip(tmp_path: Path, **case: Any) -> None:
    query, key_value, width = case["heads"]
    config = replace(
        TINY,
        num_heads=query,
        num_kv_heads=key_value,
        head_dim=width,
        num_layers=case["layers"],
        rope_theta=float(str(np.float32(case["theta"]))),
        rms_norm_eps=case["eps"],
        rope_pairing=case["pairing"],
    )
    source = draft(config, seed=case["seed"]).read(tmp_path / "source.apr")
    vocabulary = Vocabulary(tokens=tuple(case["tokens"]), merges=("a b",), pre_tokenizer="qwen2", model="gpt2")
    target = tmp_path / "target.apr"
    target.unlink(missing_ok=True)
    write_apr(
        target,
        config=config,
        tensors=source.tensors.values(),
        vocabulary=vocabulary,
        chat_template=case["template"],
        extra_metadata=case["custom"],
    )
    again = read_apr(target, verify=True)
    assert again.config == config
    assert again.vocabulary == vocabulary
    assert again.chat_template == case["template"]
    kept = {key: value for key, value in case["custom"].items() if value is not None}
    assert {key: again.metadata[key] for key in kept} == kept
    assert [t.data.tobytes() for t in again.tensors.values()] == [
        source.tensors[name].data.tobytes() for name in again.tensors
    ]
    assert "apr-footer-crc-wrong" not in finding_ids(again)


def test_wide_models_keep_their_blocks(tmp_path: Path) -> None:
    source = draft(WIDE).read(tmp_path / "wide.apr")
    gate = "model.layers.0.mlp.gate_proj.weight"
    blocks = np.random.default_rng(0).integers(0, 256, 256 * 144, np.uint8)
    tensors = dict(source.tensors) | {gate: EncodedTensor(gate, (256, 256), "Q4_K", blocks)}
    written = write(tmp_path / "a.apr", source, tensors=tensors.values())
    assert written.tensors[gate].block_type == "Q4_K"
    assert (written.tensors[gate].data == blocks).all()
