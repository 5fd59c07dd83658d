"""Conversion in every direction: bytes, values, metadata, policy, and outputs that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import TINY, tiny_tensors, write_tiny_gguf

from aprjax.blocks import byte_size
from aprjax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from aprjax.checkpoint.apr_writer import write_apr
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.gguf_metadata import GgufRecord, RecordError
from aprjax.checkpoint.tensor_plan import PlannedTensor

TYPES = gguf.GGUFValueType
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
K_QUANTS = {GATE: "Q4_K", UP: "Q4_K", DOWN: "Q6_K", "lm_head.weight": "Q6_K"}
# Every kind of value that an APR file has no home for.
ODD_KEYS: dict[str, tuple[Any, gguf.GGUFValueType]] = {
    "general.quantized_by": ("someone", TYPES.STRING),
    "general.empty": ("", TYPES.STRING),
    "custom.u8": (7, TYPES.UINT8),
    "custom.u64": (2**64 - 1, TYPES.UINT64),
    "custom.f32": (0.1, TYPES.FLOAT32),
    "custom.f64": (0.1, TYPES.FLOAT64),
    "custom.nan": (float("nan"), TYPES.FLOAT32),
    "custom.infinite": (float("-inf"), TYPES.FLOAT64),
    "custom.flag": (True, TYPES.BOOL),
    "custom.texts": (["ä", "", "\x00"], TYPES.ARRAY),
    "custom.floats": ([0.1, 0.2], TYPES.ARRAY),
    "qwen2.attention.head_count": ([4, 4], TYPES.ARRAY),
    "qwen2.vocab_size": (300, TYPES.UINT32),
    "qwen2.rope.dimension_count": (64, TYPES.UINT32),
    "qwen2.block_count": (2, TYPES.UINT64),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.decode() for name, tensor in checkpoint.tensors.items()}


def assert_same_values(left: Checkpoint, right: Checkpoint) -> None:
    assert set(left.tensors) == set(right.tensors)
    for name, array in values(left).items():
        assert np.array_equal(array, right.tensors[name].decode()), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("through", ["a.apr", "folder"])
def test_gguf_comes_back_byte_for_byte(tmp_path: Path, through: str, tied: bool) -> None:
    types = K_QUANTS if through == "a.apr" else {}
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=types, tied=tied), extra=ODD_KEYS)
    there = convert(source, tmp_path / through)
    back = convert(tmp_path / through, tmp_path / "back.gguf")
    assert sha256(tmp_path / "back.gguf") == sha256(source)
    assert there.decoded == back.decoded == {}
    expected = {"a.apr": ("synthesized", "dropped"), "folder": ("absent", "absent")}[through]
    assert (there.head, back.head) == (expected if tied else ("kept", "kept"))
    assert there.tensors == len(open_checkpoint(tmp_path / through).tensors)
    assert open_checkpoint(tmp_path / through).config == TINY


def test_gguf_defaults_and_alignment_come_back(tmp_path: Path) -> None:
    """A file that leaves keys to the reader's defaults is given back without them."""
    source = write_tiny_gguf(
        tmp_path / "s.gguf",
        tiny_tensors(replace(TINY, num_kv_heads=4)),
        config=replace(TINY, num_kv_heads=4),
        leave_out=("qwen2.rope.freq_base", "qwen2.attention.head_count_kv", "tokenizer.ggml.add_bos_token"),
    )
    convert(source, tmp_path / "a.apr")
    convert(tmp_path / "a.apr", tmp_path / "b.gguf")
    assert sha256(tmp_path / "b.gguf") == sha256(source)


def test_a_split_file_becomes_one(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "s.gguf", split_max_tensors=10)
    whole = write_tiny_gguf(tmp_path / "whole.gguf")
    convert(tmp_path / "s-00002-of-00003.gguf", tmp_path / "joined.gguf")
    joined, reference = open_checkpoint(tmp_path / "joined.gguf"), open_checkpoint(whole)
    assert joined.findings == ()
    assert dict(joined.metadata) == dict(reference.metadata)
    assert joined.tensors["lm_head.weight"].sha256() == reference.tensors["lm_head.weight"].sha256()
    with pytest.raises(CheckpointError, match="the target is the source"):
        convert(tmp_path / "s-00001-of-00003.gguf", tmp_path / "s-00003-of-00003.gguf")


def test_an_edit_of_the_apr_file_reaches_the_gguf_file(tmp_path: Path) -> None:
    """What the model determines comes from the model, not from the record of the file before."""
    source = write_tiny_gguf(tmp_path / "s.gguf", extra={"qwen2.attention.head_count": ([4, 4], TYPES.ARRAY)})
    convert(source, tmp_path / "a.apr")
    checkpoint = open_checkpoint(tmp_path / "a.apr")
    write_apr(
        tmp_path / "edited.apr",
        config=replace(checkpoint.config, rope_theta=10_000.0, max_position_embeddings=64),
        tensors=checkpoint.tensors.values(),
        vocabulary=None,
        source_metadata=checkpoint.metadata["source_metadata"],
    )
    report = convert(tmp_path / "edited.apr", tmp_path / "edited.gguf")
    edited = open_checkpoint(tmp_path / "edited.gguf")
    assert edited.metadata["qwen2.rope.freq_base"] == 10_000.0
    assert edited.metadata["qwen2.context_length"] == 64
    assert edited.metadata["qwen2.attention.head_count"] == (4, 4)
    assert "tokenizer.ggml.tokens" not in edited.metadata
    assert any("no vocabulary" in note for note in report.notes)


def test_unusual_rope_pairing_cannot_go_into_gguf_or_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "s.gguf"))
    write_apr(
        tmp_path / "norm.apr",
        config=replace(checkpoint.config, rope_pairing="norm"),
        tensors=checkpoint.tensors.values(),
        vocabulary=checkpoint.vocabulary,
    )
    for target in ("out.gguf", "folder"):
        with pytest.raises(CheckpointError, match="rope pairing 'norm'"):
            convert(tmp_path / "norm.apr", tmp_path / target)
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize("block_type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q5_K"])
def test_one_such_type_widens_the_whole_model_as_apr_import_does(tmp_path: Path, block_type: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=K_QUANTS | {UP: block_type}))
    report = convert(source, tmp_path / "a.apr")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "a.apr")
    assert {tensor.block_type for tensor in after.tensors.values()} == {"F32"}
    assert_same_values(before, after)
    assert after.vocabulary == before.vocabulary
    assert after.chat_template == before.chat_template
    assert any(f"APR cannot hold a type ({block_type}; GH-375)" in note for note in report.notes)
    assert report.decoded[f"{block_type} -> F32"] == 1


@pytest.mark.parametrize("block_type", ["Q4_0", "Q8_0", "Q5_K", "Q2_K", "Q3_K", "BF16"])
def test_keep_blocks_widens_only_what_apr_cannot_hold(tmp_path: Path, block_type: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=K_QUANTS | {UP: block_type}))
    report = convert(source, tmp_path / "a.apr", keep_blocks=True)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "a.apr")
    assert_same_values(before, after)
    kept = "BF16" if block_type == "BF16" else "F32"
    assert after.tensors[UP].block_type == kept
    for name, tensor in before.tensors.items():
        if name != UP:
            assert after.tensors[name].block_type == tensor.block_type
            assert np.array_equal(after.tensors[name].data, tensor.data)
    assert report.decoded == ({} if kept == "BF16" else {f"{block_type} -> F32": 1})
    convert(tmp_path / "a.apr", tmp_path / "back.gguf")
    back = open_checkpoint(tmp_path / "back.gguf")
    assert_same_values(before, back)
    assert back.findings == ()


@pytest.mark.parametrize("block_type", ["Q2_K", "Q3_K", "BF16"])
def test_what_apr_import_refuses_is_refused(tmp_path: Path, block_type: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types={UP: block_type}))
    with pytest.raises(CheckpointError, match=f"refuses {block_type}") as caught:
        convert(source, tmp_path / "a.apr")
    assert caught.value.tensor == UP
    assert "--keep-blocks" in (caught.value.fix or "")
    assert os.listdir(tmp_path) == ["s.gguf"]


def test_norms_and_biases_become_float32(tmp_path: Path) -> None:
    names = ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias")
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=dict.fromkeys(names, "F16")))
    for target in ("a.apr", "b.gguf"):
        convert(source, tmp_path / target)
        after = open_checkpoint(tmp_path / target)
        assert {after.tensors[name].block_type for name in names} == {"F32"}
        assert_same_values(open_checkpoint(source), after)


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_safetensors_in_the_type_asked_for(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=K_QUANTS))
    convert(source, tmp_path / "m", dtype=dtype)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "m")
    assert {tensor.block_type for tensor in after.tensors.values()} == {dtype}
    for name, expected in values(before).items():
        # Rounding to the nearest: half a unit in the last place, or half the smallest subnormal (2^-25 for F16).
        assert np.all(
            np.abs(after.tensors[name].decode() - expected) <= np.abs(expected) * tolerance + 2**-25 * (tolerance > 0)
        )


def test_values_that_do_not_fit_float16_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.norm.weight"] = ("F32", np.full(256, 1e6, np.float32).view(np.uint8))
    source = write_tiny_gguf(tmp_path / "s.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"values up to 1e[+]06 do not fit F16"):
        convert(source, tmp_path / "m", dtype="F16")
    assert os.listdir(tmp_path) == ["s.gguf"]


def test_a_folder_without_padding_tokens_is_padded_for_llama_cpp(tmp_path: Path) -> None:
    convert(write_tiny_gguf(tmp_path / "s.gguf"), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:1]
    for token in ("<|im_start|>", "<|im_end|>", "[PAD296]"):
        del content["model"]["vocab"][token]
    path.write_text(json.dumps(content))
    report = convert(tmp_path / "m", tmp_path / "b.gguf")
    vocabulary = open_checkpoint(tmp_path / "b.gguf").vocabulary
    assert vocabulary is not None
    assert vocabulary.tokens[296:] == ("[PAD296]", "<|endoftext|>", "[PAD298]", "[PAD299]")
    assert vocabulary.token_types[296:] == (5, 3, 5, 5)
    assert any("2 unused tokens" in note for note in report.notes)


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(
        st.tuples(
            st.text(max_size=8),
            st.sampled_from(["STRING", "UINT32", "FLOAT64", "BOOL", "ARRAY[STRING]", "ARRAY[FLOAT32]"]),
            st.one_of(
                st.none(), st.text(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(),
                st.lists(st.text(max_size=4), max_size=3).map(tuple),
                st.lists(st.floats(), max_size=3).map(tuple),
                st.binary(max_size=6).map(lambda raw: raw.decode(errors="surrogateescape")),
            ),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_the_record_survives_its_text(entries: list[tuple[str, str, Any]]) -> None:
    kept = tuple(entry for entry in entries if entry[0] != "general.alignment")
    record = GgufRecord(kept, (("blk.0.ffn_up.weight", "Q4_K"),))
    text = record.to_text()
    assert text.isascii()
    # repr: NaN equals itself there, and -0.0 differs from 0.0.
    assert repr(GgufRecord.from_text(text)) == repr(record)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "[]",
        "{}",
        '{"metadata": [], "tensors": [["a"]]}',
        '{"metadata": [["k", "ARRAY", null]], "tensors": []}',
        '{"metadata": [["k", "UINT128", 1]], "tensors": []}',
        '{"metadata": [["general.alignment", "UINT32", 48]], "tensors": []}',
        '{"metadata": [["general.alignment", "UINT32", 1099511627776]], "tensors": []}',
        '{"metadata": [["k", "STRING", {"a": 1}]], "tensors": []}',
        "[" * 100_000,
    ],
)
def test_a_damaged_record_is_left_out_and_said(tmp_path: Path, text: Any) -> None:
    with pytest.raises(RecordError):
        GgufRecord.from_text(text)
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "s.gguf"))
    write_apr(
        tmp_path / "a.apr",
        config=checkpoint.config,
        tensors=checkpoint.tensors.values(),
        vocabulary=checkpoint.vocabulary,
        source_metadata={"gguf": str(text)},
    )
    report = convert(tmp_path / "a.apr", tmp_path / "b.gguf")
    assert any("cannot be read" in note for note in report.notes)
    assert open_checkpoint(tmp_path / "b.gguf").findings == ()


def test_a_record_with_values_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "s.gguf"))
    for value in ('"text"', "-1", "256", "1.5", "1e400", "true", "[1]", "null"):
        text = '{"metadata": [["custom.key", "UINT8", %s]], "tensors": []}' % value  # noqa: UP031
        write_apr(
            tmp_path / "a.apr",
            config=checkpoint.config,
            tensors=checkpoint.tensors.values(),
            vocabulary=checkpoint.vocabulary,
            source_metadata={"gguf": text},
        )
        if value == "null":
            convert(tmp_path / "a.apr", tmp_path / "b.gguf")
            assert "custom.key" not in open_checkpoint(tmp_path / "b.gguf").metadata
        else:
            with pytest.raises(CheckpointError, match=r"'custom\.key': .* cannot be written as UINT8"):
                convert(tmp_path / "a.apr", tmp_path / "c.gguf")
            assert not (tmp_path / "c.gguf").exists()


def test_row_padded_blocks_are_decoded_never_reencoded(tmp_path: Path) -> None:
    """Rows of 100 padded to a block of 256 have no place in GGUF, and encoding them again would change them."""
    from aprjax.checkpoint.conversion_policy import plan_conversion

    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "s.gguf", tiny_tensors(types=K_QUANTS)))
    gate = checkpoint.tensors[GATE]
    padded = replace(gate, row_padded=True)
    for target in ("apr", "gguf", "safetensors"):
        plan = plan_conversion(
            replace(checkpoint, format="apr", tensors={**checkpoint.tensors, GATE: padded}, metadata={}), target
        )
        planned = next(tensor for tensor in plan.tensors if tensor.name == GATE)
        assert planned.block_type == "F32"
        written = np.concatenate(list(planned.chunks())).view(np.float32).reshape(gate.shape)
        assert np.array_equal(written, gate.decode())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_pieces_join_to_the_whole(rows: int, width: int, seed: int) -> None:
    from aprjax.checkpoint import EncodedTensor, tensor_plan

    random = np.random.default_rng(seed)
    shape = (rows, 32 * width)
    data = random.integers(0, 256, byte_size("Q8_0", shape), dtype=np.uint8)
    data.reshape(-1, 34)[:, 1] = 0x1C  # finite scales
    source = EncodedTensor("a", shape, "Q8_0", data)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(tensor_plan, "_CHUNK_ELEMENTS", 500)
        patcher.setattr(tensor_plan, "_CHUNK_BYTES", 77)
        assert np.array_equal(PlannedTensor("a", source, "Q8_0").data, data)
        assert np.concatenate(list(PlannedTensor("a", source, "Q8_0").chunks())).tobytes() == data.tobytes()
        assert PlannedTensor("a", source, "F32").data.tobytes() == source.decode().tobytes()
