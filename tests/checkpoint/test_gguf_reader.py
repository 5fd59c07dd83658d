"""The GGUF reader against gguf-py's, on files that gguf-py wrote, and on what it must find or refuse."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bytes import patch, replace, string
from tiny_gguf import TEMPLATE, TINY, tiny_tensors, tiny_tokens, write_tiny_gguf

from aprjax.checkpoint import CheckpointError, open_checkpoint
from aprjax.checkpoint.gguf_format import GgufMetadata
from aprjax.checkpoint.gguf_reader import read_gguf
from aprjax.checkpoint.names import GLOBAL_NAMES, LAYER_NAMES, gguf_to_hf, hf_to_gguf
from aprjax.checkpoint.types import canonical_tensor_names

TYPES = gguf.GGUFValueType
MIXED = {
    "model.layers.0.mlp.gate_proj.weight": "Q4_K",
    "model.layers.0.mlp.up_proj.weight": "Q5_0",
    "model.layers.0.mlp.down_proj.weight": "Q6_K",
    "model.layers.1.mlp.gate_proj.weight": "Q8_0",
    "model.layers.1.mlp.up_proj.weight": "BF16",
    "model.layers.1.mlp.down_proj.weight": "Q5_K",
    "model.layers.1.self_attn.q_proj.weight": "Q4_0",
    "model.layers.1.self_attn.k_proj.weight": "Q4_1",
    "model.layers.1.self_attn.v_proj.weight": "Q5_1",
    "model.layers.1.self_attn.o_proj.weight": "Q2_K",
    "model.layers.0.self_attn.o_proj.weight": "Q3_K",
}


def assert_agrees_with_gguf_py(path: Path) -> None:
    """Metadata (keys, order, types, values) and tensors (names, shapes, bytes, offsets) as gguf-py reads them."""
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    assert isinstance(ours.metadata, GgufMetadata)
    for key, field in fields.items():
        kind = field.types[0].name if len(field.types) == 1 else f"ARRAY[{field.types[1].name}]"
        assert ours.metadata.types[key] == kind
        contents = field.contents()
        assert ours.metadata[key] == (tuple(contents) if isinstance(contents, list) else contents), key
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor, reference in zip(ours.tensors.values(), theirs.tensors, strict=True):
        assert tensor.stored_name == reference.name
        assert tensor.name == gguf_to_hf(reference.name)
        assert tensor.shape == tuple(int(size) for size in reversed(reference.shape))
        assert tensor.block_type == reference.tensor_type.name
        assert tensor.offset == reference.data_offset
        assert np.array_equal(tensor.data, reference.data.reshape(-1).view(np.uint8))


def test_all_block_types_and_metadata_read_as_gguf_py_reads_them(tmp_path: Path) -> None:
    extra: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "test.u8": (255, TYPES.UINT8),
        "test.i8": (-128, TYPES.INT8),
        "test.u16": (65535, TYPES.UINT16),
        "test.i16": (-32768, TYPES.INT16),
        "test.i32": (-(2**31), TYPES.INT32),
        "test.u64": (2**64 - 1, TYPES.UINT64),
        "test.i64": (-(2**63), TYPES.INT64),
        "test.f32": (0.1, TYPES.FLOAT32),
        "test.f64": (0.1, TYPES.FLOAT64),
        "test.true": (True, TYPES.BOOL),
        "test.text": ("naïve ☃ \n\t\0 end", TYPES.STRING),
        "test.floats": ([0.1, -2.5, 3e38], TYPES.ARRAY),
        "test.flags": ([True, False, True], TYPES.ARRAY),
        "test.long": (["x" * 255, "y" * 256, "z" * 70_000, "é" * 200], TYPES.ARRAY),
    }
    path = write_tiny_gguf(tmp_path / "mixed.gguf", tiny_tensors(types=MIXED), extra=extra)
    assert_agrees_with_gguf_py(path)
    checkpoint = read_gguf(path)
    assert checkpoint.findings == ()
    assert checkpoint.config == TINY
    assert checkpoint.chat_template == TEMPLATE
    tokens, types, merges = tiny_tokens()
    vocabulary = checkpoint.vocabulary
    assert vocabulary is not None
    assert (list(vocabulary.tokens), list(vocabulary.token_types), list(vocabulary.merges)) == (tokens, types, merges)
    assert (vocabulary.bos_token_id, vocabulary.eos_token_id, vocabulary.padding_token_id) == (297, 299, 297)
    assert (vocabulary.add_bos, vocabulary.pre_tokenizer, vocabulary.model) == (False, "qwen2", "gpt2")


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "v2.gguf")
    patch(path, 4, struct.pack("<I", 2))
    assert_agrees_with_gguf_py(path)


def test_alignment_is_taken_from_the_file(tmp_path: Path) -> None:
    writer_key = {"general.alignment": (128, TYPES.UINT32)}
    path = write_tiny_gguf(tmp_path / "plain.gguf")
    assert read_gguf(path).metadata.alignment == 32  # type: ignore[attr-defined]
    tensors = tiny_tensors()
    aligned = tmp_path / "aligned.gguf"
    # gguf-py pads by an attribute of the writer, so the key alone would make a file that contradicts itself.
    original = gguf.GGUFWriter.__init__

    def padded(self: gguf.GGUFWriter, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.data_alignment = 128

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(gguf.GGUFWriter, "__init__", padded)
        write_tiny_gguf(aligned, tensors, extra=writer_key)
    assert_agrees_with_gguf_py(aligned)
    assert all(tensor.offset % 128 == 0 for tensor in read_gguf(aligned).tensors.values())
    assert read_gguf(aligned).findings == ()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model that gguf-py split by tensor count."""
    write_tiny_gguf(tmp_path / "split.gguf", split_max_tensors=10)
    found = sorted(tmp_path.glob("split-*.gguf"))
    assert [path.name for path in found] == [f"split-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    return found


def test_a_split_model_opens_by_any_part_and_equals_the_whole(parts: list[Path], tmp_path: Path) -> None:
    whole = read_gguf(write_tiny_gguf(tmp_path / "whole.gguf"))
    for part in parts:
        split = open_checkpoint(part)
        assert split.files == tuple(parts)
        assert split.config == whole.config
        assert split.vocabulary == whole.vocabulary
        assert split.findings == ()
        assert list(split.tensors) == list(whole.tensors)
        for name, tensor in split.tensors.items():
            assert np.array_equal(tensor.data, whole.tensors[name].data)
            with open(tensor.file, "rb") as stream:
                stream.seek(tensor.offset)
                assert stream.read(tensor.nbytes) == tensor.data.tobytes()
    assert len({Path(tensor.file) for tensor in split.tensors.values()}) == 3


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing: split-00002-of-00003\.gguf"):
        read_gguf(parts[2])


def test_parts_under_wrong_names_are_refused(parts: list[Path], tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(parts[0], renamed)
    with pytest.raises(CheckpointError, match="calls this part 1 of 3, its name part 1 of 1"):
        read_gguf(renamed)
    parts[1].rename(tmp_path / "spare")
    parts[2].rename(parts[1])
    (tmp_path / "spare").rename(parts[2])
    with pytest.raises(CheckpointError, match="calls this part 3 of 3, its name part 2 of 3"):
        read_gguf(parts[0])


def test_names_map_to_hugging_face_and_back() -> None:
    assert gguf_to_hf("blk.17.attn_output.weight") == "model.layers.17.self_attn.o_proj.weight"
    assert hf_to_gguf("model.layers.3.mlp.gate_proj.weight") == "blk.3.ffn_gate.weight"
    for name in canonical_tensor_names(TINY):
        assert hf_to_gguf(name) != name
        assert gguf_to_hf(hf_to_gguf(name)) == name
    for table in (GLOBAL_NAMES, LAYER_NAMES):
        assert len(set(table.values())) == len(table)
    assert gguf_to_hf("blk.2.unheard_of.weight") == "model.layers.2.unheard_of.weight"
    assert hf_to_gguf("model.layers.2.unheard_of.weight") == "blk.2.unheard_of.weight"
    assert gguf_to_hf("rope_freqs.weight") == "rope_freqs.weight"


NAN_F32, INFINITE_F32 = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qwen2.attention.head_count", (0, TYPES.UINT32), "head_count between 1 and 256, found 0"),
        ("qwen2.attention.head_count_kv", (3, TYPES.UINT32), "4 heads cannot share 3"),
        ("qwen2.attention.head_count", (5, TYPES.UINT32), "hidden size 256 is no multiple of 5"),
        ("qwen2.block_count", (10**6, TYPES.UINT32), "block_count between 1 and 256, found 1000000"),
        ("qwen2.block_count", (-1, TYPES.INT32), "found -1"),
        ("qwen2.block_count", (2.0, TYPES.FLOAT32), "expected an integer qwen2.block_count, found 2.0"),
        ("qwen2.block_count", (True, TYPES.BOOL), "expected an integer qwen2.block_count, found True"),
        ("qwen2.block_count", ("2", TYPES.STRING), "expected an integer qwen2.block_count"),
        ("qwen2.embedding_length", (2**63, TYPES.UINT64), "embedding_length between"),
        ("qwen2.attention.key_length", (63, TYPES.UINT32), "head width 63 is odd"),
        ("qwen2.rope.freq_base", (float("nan"), TYPES.FLOAT32), "freq_base between 1 and 1e[+]08, found nan"),
        ("qwen2.rope.freq_base", (0.0, TYPES.FLOAT32), "found 0.0"),
        ("qwen2.attention.layer_norm_rms_epsilon", (float("inf"), TYPES.FLOAT32), "found inf"),
        ("qwen2.attention.layer_norm_rms_epsilon", (-1e-6, TYPES.FLOAT32), "epsilon between"),
        ("tokenizer.ggml.tokens", ([1, 2], TYPES.ARRAY), "tokens to hold str, found ARRAY.INT32."),
        ("tokenizer.ggml.eos_token_id", ("2", TYPES.STRING), "eos_token_id as int, found STRING"),
        ("tokenizer.chat_template", (7, TYPES.UINT32), "chat_template as str, found UINT32"),
        ("general.alignment", (48, TYPES.UINT32), "power of two in UINT32, found 48"),
        ("general.alignment", (0, TYPES.UINT32), "power of two in UINT32, found 0"),
        ("general.alignment", ("32", TYPES.STRING), "power of two in UINT32, found '32' in STRING"),
    ],
)
def test_impossible_configs_are_refused(
    tmp_path: Path, key: str, value: tuple[Any, gguf.GGUFValueType], message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf", extra={key: value})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
)
def test_missing_dimensions_are_refused(tmp_path: Path, key: str) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf", leave_out=(f"qwen2.{key}",))
    with pytest.raises(CheckpointError, match=f"expected an integer qwen2.{key}, found nothing"):
        read_gguf(path)


def finding_ids(path: Path) -> list[tuple[str, str, str | None]]:
    return [(finding.id, finding.severity, finding.tensor) for finding in read_gguf(path).findings]


@pytest.mark.parametrize(
    ("extra", "leave_out", "expected"),
    [
        ({}, ("qwen2.rope.freq_base",), ("rope-theta-defaulted", "warning", None)),
        ({}, ("qwen2.attention.head_count_kv",), ("kv-heads-defaulted", "warning", None)),
        ({"qwen2.rope.scaling.type": ("yarn", TYPES.STRING)}, (), ("rope-scaling-unsupported", "error", None)),
        ({"qwen2.rope.scaling.factor": (4.0, TYPES.FLOAT32)}, (), ("rope-scaling-unsupported", "error", None)),
        ({"qwen2.rope.dimension_count": (32, TYPES.UINT32)}, (), ("head-width-mismatch", "error", None)),
        ({"tokenizer.ggml.token_type": ([1, 1], TYPES.ARRAY)}, (), ("token-types-length", "error", None)),
        ({"tokenizer.ggml.eos_token_id": (300, TYPES.UINT32)}, (), ("token-id-out-of-range", "warning", None)),
        ({}, ("tokenizer.ggml.tokens",), ("vocabulary-missing", "warning", None)),
        ({}, ("tokenizer.ggml.merges",), ("merges-missing", "warning", None)),
        ({"tokenizer.ggml.tokens": (["a"], TYPES.ARRAY)}, (), ("vocabulary-padded", "info", None)),
        ({"tokenizer.ggml.tokens": (["a"] * 301, TYPES.ARRAY)}, (), ("vocabulary-too-long", "error", None)),
    ],
)
def test_odd_metadata_become_findings(
    tmp_path: Path, extra: dict[str, Any], leave_out: tuple[str, ...], expected: tuple[str, str, str | None]
) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", extra=extra, leave_out=leave_out)
    assert expected in finding_ids(path)


def test_harmless_rope_keys_are_no_findings(tmp_path: Path) -> None:
    extra = {
        "qwen2.rope.scaling.type": ("none", TYPES.STRING),
        "qwen2.rope.scaling.factor": (1.0, TYPES.FLOAT32),
        "qwen2.rope.dimension_count": (64, TYPES.UINT32),
        "qwen2.attention.head_count": ([4, 4], TYPES.ARRAY),
    }
    path = write_tiny_gguf(tmp_path / "fine.gguf", extra=extra)
    assert finding_ids(path) == []
    assert read_gguf(path).config == TINY


def test_defaults_are_those_of_llama_cpp(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "sparse.gguf", leave_out=("qwen2.rope.freq_base", "qwen2.attention.head_count_kv")
    )
    config = read_gguf(path).config
    assert (config.rope_theta, config.num_kv_heads) == (10_000.0, 4)


def test_missing_reshaped_and_foreign_tensors_are_findings(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    bias, gate = "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.gate_proj.weight"
    del tensors[bias]
    del tensors["lm_head.weight"]
    tensors["rope_freqs.weight"] = ("F32", np.zeros(16, np.uint8))
    path = write_tiny_gguf(tmp_path / "odd.gguf", tensors)
    assert finding_ids(path) == [
        ("missing-tensor", "error", bias),
        ("unexpected-tensor", "info", "rope_freqs.weight"),
    ]
    assert read_gguf(path).tied_head()
    # The same bytes under swapped dimensions: 512 x 256 becomes 256 x 512.
    name = string("blk.0.ffn_gate.weight") + struct.pack("<I", 2)
    replace(path, name + struct.pack("<2Q", 256, 512), name + struct.pack("<2Q", 512, 256))
    assert ("shape-mismatch", "error", gate) in finding_ids(path)


def test_tensors_that_share_bytes_are_found(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "overlap.gguf")
    entry = string("blk.1.ffn_up.weight") + struct.pack("<I2QI", 2, 256, 512, 1)
    at = path.read_bytes().index(entry) + len(entry)
    offset = struct.unpack_from("<Q", path.read_bytes(), at)[0]
    patch(path, at, struct.pack("<Q", offset - 64))
    assert [(i, s) for i, s, _ in finding_ids(path)] == [
        ("gguf-tensor-gap", "warning"),
        ("gguf-tensor-gap", "warning"),
        ("tensor-overlap", "error"),
    ]
    patch(path, at, struct.pack("<Q", offset - 1))
    assert finding_ids(path)[0][0] == "gguf-tensor-unaligned"


def test_text_that_is_not_utf8_is_kept_and_said(tmp_path: Path) -> None:
    tokens = tiny_tokens()[0]
    tokens[5] = "QQQQ"
    path = write_tiny_gguf(tmp_path / "latin.gguf", extra={"tokenizer.ggml.tokens": (tokens, TYPES.ARRAY)})
    replace(path, string("QQQQ"), struct.pack("<Q", 4) + b"Q\xff\xfeQ")
    assert ("gguf-invalid-utf8", "warning", None) in finding_ids(path)
    vocabulary = read_gguf(path).vocabulary
    assert vocabulary is not None
    assert vocabulary.tokens[5].encode(errors="surrogateescape") == b"Q\xff\xfeQ"
    assert vocabulary.tokens[4] == tokens[4]
    assert vocabulary.tokens[6:] == tuple(tokens[6:])


@pytest.mark.real_model
def test_the_real_file_reads_as_gguf_py_reads_it(model_path: Callable[[str], Path]) -> None:
    path = model_path("qwen2.5-coder-0.5b")
    assert_agrees_with_gguf_py(path)
    checkpoint = read_gguf(path)
    assert checkpoint.findings == ()
    assert (len(checkpoint.tensors), checkpoint.config.head_dim) == (291, 64)
