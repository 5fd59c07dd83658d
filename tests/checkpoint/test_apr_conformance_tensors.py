"""Conformance cases 19 to 25 of apr-format.md 10: dtype bytes, block layouts, sizes."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from apr_drafts import WIDE, Part, draft, f32, finding_ids, random_blocks

from aprjax.blocks import FORMATS, byte_size, dequantize, encode
from aprjax.checkpoint.types import Checkpoint, CheckpointError

EXTRA = "extra.weight"
UNEXPECTED = "unexpected-tensor"


def with_extra(path: Path, dtype: int, shape: tuple[int, ...], data: bytes) -> Checkpoint:
    changed = draft()
    changed.tensors[EXTRA] = Part(dtype, shape, data)
    return changed.read(path)


# dtype byte, block type that the bytes are of, findings. Shapes have 512 elements: Q4_K, Q4_0 and AprQ4 take the same
# 288 bytes there, which is what makes byte 8 ambiguous.
DTYPES = [
    (0, "F32", set()),
    (1, "F16", set()),
    (2, "Q4_0", {"apr-dtype-disputed"}),
    (2, "BF16", {"apr-dtype-disputed"}),
    (3, "F64", {"apr-dtype-disputed"}),
    (3, "Q4_1", {"apr-dtype-disputed"}),
    (4, "I32", {"apr-dtype-ambiguous"}),
    (5, "I64", {"apr-dtype-disputed"}),
    (6, "I8", {"apr-dtype-disputed"}),
    (6, "Q5_0", {"apr-dtype-disputed"}),
    (7, "Q5_1", {"apr-dtype-disputed"}),
    (8, "AprQ4", {"apr-dtype-ambiguous"}),
    (8, "Q8_0", {"apr-dtype-disputed"}),
    (8, "Q5_K", {"apr-dtype-disputed"}),
    (9, "AprQ8", {"apr-dtype-disputed"}),
    (9, "Q6_K", {"apr-dtype-disputed"}),
    (10, "Q2_K", {"apr-dtype-disputed"}),
    (10, "Q8_0", {"apr-dtype-disputed"}),
    (11, "Q3_K", {"apr-dtype-disputed"}),
    (12, "Q4_K", set()),
    (13, "Q5_K", {"apr-dtype-disputed"}),
    (14, "Q6_K", set()),
    (15, "F32", {"apr-dtype-disputed"}),
    (16, "IQ2_XXS", {"apr-dtype-disputed"}),
    (17, "IQ2_XS", {"apr-dtype-disputed"}),
    (30, "BF16", set()),
    (128, "AprQ4", {"apr-dtype-disputed"}),
    (129, "AprQ8", {"apr-dtype-disputed"}),
    (255, "F32", {"apr-dtype-disputed"}),
]


@pytest.mark.parametrize(("byte", "block_type", "expected"), DTYPES)
def test_case_19_dtype_bytes(tmp_path: Path, byte: int, block_type: str, expected: set[str]) -> None:
    shape = (2, 256)
    data = np.random.default_rng(byte).integers(0, 256, byte_size(block_type, shape), np.uint8)
    checkpoint = with_extra(tmp_path / "a.apr", byte, shape, data.tobytes())
    tensor = checkpoint.tensors[EXTRA]
    assert tensor.block_type == block_type
    assert tensor.data.tobytes() == data.tobytes()
    assert finding_ids(checkpoint) == expected | {UNEXPECTED}


@pytest.mark.parametrize(
    ("byte", "written_as", "read_as"),
    [(12, "F32", "F32"), (14, "Q4_1", "Q4_1"), (0, "Q6_K", "Q6_K"), (30, "F64", "F64")],
)
def test_case_19_a_wrong_byte_is_corrected_where_one_type_fits(
    tmp_path: Path, byte: int, written_as: str, read_as: str
) -> None:
    shape = (2, 256)
    data = bytes(byte_size(written_as, shape))
    checkpoint = with_extra(tmp_path / "a.apr", byte, shape, data)
    assert finding_ids(checkpoint) == {"apr-dtype-contradicts-size", UNEXPECTED}
    assert checkpoint.tensors[EXTRA].block_type == read_as


@pytest.mark.parametrize(("byte", "size"), [(12, 1024), (0, 288), (0, 2047), (12, 287), (7, 512), (255, 3)])
def test_case_19_a_wrong_byte_that_cannot_be_corrected(tmp_path: Path, byte: int, size: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        with_extra(tmp_path / "a.apr", byte, (2, 256), bytes(size))
    assert caught.value.tensor == EXTRA
    assert str(size) in caught.value.message


def test_case_19_all_candidates_are_named(tmp_path: Path) -> None:
    checkpoint = with_extra(tmp_path / "a.apr", 8, (2, 256), bytes(288))
    finding = next(finding for finding in checkpoint.findings if finding.id == "apr-dtype-ambiguous")
    assert "read as AprQ4" in finding.message
    assert "Q4_K would fit as well" in finding.message
    assert finding.reference is not None
    assert "GH-239" in finding.reference


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_case_20_decoding_matches_ggml(tmp_path: Path, name: str) -> None:
    blocks = random_blocks(name, 3)
    byte = {"Q4_K": 12, "Q6_K": 14}[name]
    checkpoint = with_extra(tmp_path / "a.apr", byte, (3, 256), blocks)
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.dequantize(np.frombuffer(blocks, np.uint8).reshape(3, -1), kind)
    np.testing.assert_array_equal(checkpoint.tensors[EXTRA].decode(), expected)


def test_case_20_interleaved_nibbles_decode_to_something_else(tmp_path: Path) -> None:
    blocks = np.frombuffer(random_blocks("Q4_K", 4), np.uint8).reshape(4, 144).copy()
    quants = blocks[:, 16:].reshape(-1, 4, 32)
    values = np.concatenate([quants & 15, quants >> 4], axis=2).reshape(4, 256)
    interleaved = blocks.copy()
    interleaved[:, 16:] = values[:, 0::2] | values[:, 1::2] << 4
    right = with_extra(tmp_path / "a.apr", 12, (4, 256), blocks.tobytes()).tensors[EXTRA].decode()
    wrong = with_extra(tmp_path / "b.apr", 12, (4, 256), interleaved.tobytes()).tensors[EXTRA].decode()
    cosine = float((right * wrong).sum() / math.sqrt((right**2).sum() * (wrong**2).sum()))
    # Nothing in the file tells: the same nibbles, elsewhere. Only a comparison shows it.
    assert cosine < 0.95


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("row_padded", [True, False])
def test_case_21_rows_that_are_no_whole_blocks(tmp_path: Path, name: str, row_padded: bool) -> None:
    shape = (3, 896)
    count = 3 * 4 if row_padded else -(-3 * 896 // 256)
    blocks = random_blocks(name, count)
    byte = {"Q4_K": 12, "Q6_K": 14}[name]
    checkpoint = with_extra(tmp_path / "a.apr", byte, shape, blocks)
    tensor = checkpoint.tensors[EXTRA]
    assert finding_ids(checkpoint) == {"apr-rows-padded" if row_padded else "apr-rows-flat", UNEXPECTED}
    assert tensor.row_padded == row_padded
    values = FORMATS[name].decode(np.frombuffer(blocks, np.uint8).reshape(count, -1))
    expected = values.reshape(3, 1024)[:, :896] if row_padded else values.reshape(-1)[: 3 * 896].reshape(shape)
    np.testing.assert_array_equal(tensor.decode(), expected)


@pytest.mark.parametrize("columns", [256, 512])
def test_case_21_whole_blocks_leave_no_doubt(tmp_path: Path, columns: int) -> None:
    checkpoint = with_extra(tmp_path / "a.apr", 12, (3, columns), random_blocks("Q4_K", 3 * columns // 256))
    assert finding_ids(checkpoint) == {UNEXPECTED}
    assert not checkpoint.tensors[EXTRA].row_padded


def test_case_22_subnormal_scales_are_kept(tmp_path: Path) -> None:
    # 3e-5 is below float16's smallest normal number: aprender reads zero, ggml the number.
    blocks = np.frombuffer(random_blocks("Q4_K", 1), np.uint8).reshape(1, 144).copy()
    blocks[:, :4] = np.frombuffer(np.array([3e-5, 0], np.float16).tobytes(), np.uint8)
    decoded = with_extra(tmp_path / "a.apr", 12, (1, 256), blocks.tobytes()).tensors[EXTRA].decode()
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(decoded, expected)
    assert np.abs(decoded).max() > 1e-5


@pytest.mark.parametrize("shape", [(5, 7), (33,), (1,), (31, 33)])
def test_case_23_apr_q4_with_partial_blocks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).standard_normal(shape, np.float32)
    data = encode("AprQ4", values).tobytes()
    tensor = with_extra(tmp_path / "a.apr", 128, shape, data).tensors[EXTRA]
    assert tensor.block_type == "AprQ4"
    # 4 bits over [-max, max] in steps of max/7: half a step, and the float16 rounding of the scale.
    assert np.abs(tensor.decode() - values).max() <= np.abs(values).max() / 7 * 0.51


def test_case_23_all_zero_blocks(tmp_path: Path) -> None:
    # An all-zero AprQ4 block has scale 1.0 and nibbles 8.
    q4 = with_extra(tmp_path / "a.apr", 128, (32,), np.float16(1.0).tobytes() + b"\x88" * 16).tensors[EXTRA]
    assert not q4.decode().any()
    q8 = with_extra(tmp_path / "b.apr", 129, (5,), struct.pack("<f5b", 1.0, 0, 0, 0, 0, 0)).tensors[EXTRA]
    assert not q8.decode().any()


@pytest.mark.parametrize(
    ("leaf", "dtype", "expected"),
    [
        ("mlp.gate_proj.weight", 30, set()),
        ("mlp.gate_proj.weight", 1, set()),
        ("self_attn.q_proj.bias", 1, set()),
        ("self_attn.q_proj.bias", 30, {"apr-bias-not-float"}),
        ("input_layernorm.weight", 1, {"apr-norm-not-f32"}),
        ("post_attention_layernorm.weight", 30, {"apr-norm-not-f32"}),
    ],
)
def test_case_24_half_precision(tmp_path: Path, leaf: str, dtype: int, expected: set[str]) -> None:
    changed = draft()
    name = f"model.layers.0.{leaf}"
    part = changed.tensors[name]
    values = np.frombuffer(part.data, "<f4").reshape(part.shape)
    bits = values.astype("<f2").view("<u2") if dtype == 1 else (values.view("<u4") >> 16).astype("<u2")
    changed.tensors[name] = Part(dtype, part.shape, bits.tobytes())
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == expected
    np.testing.assert_allclose(checkpoint.tensors[name].decode(), values, rtol=2**-7)


def test_case_24_final_norm_in_half_precision(tmp_path: Path) -> None:
    changed = draft()
    changed.tensors["model.norm.weight"] = Part(1, (8,), np.ones(8, "<f2").tobytes())
    assert finding_ids(changed.read(tmp_path / "a.apr")) == {"apr-norm-not-f32"}


def test_case_25_halves_round_away_from_zero() -> None:
    # With a greatest magnitude of 7 the scale is exactly 1: each nibble is the value's rounding, Rust's, not NumPy's.
    values = np.zeros(32, np.float32)
    values[:8] = [7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]
    decoded = dequantize("AprQ4", encode("AprQ4", values), (32,))
    np.testing.assert_array_equal(decoded[:8], [7, 1, 2, 3, -1, -2, -3, 4])


def test_quantized_model_reads_clean(tmp_path: Path) -> None:
    changed = draft(WIDE)
    for name, part in changed.tensors.items():
        if name.endswith("_proj.weight"):
            changed.tensors[name] = Part(12, part.shape, random_blocks("Q4_K", math.prod(part.shape) // 256))
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == set()
    assert checkpoint.config == replace(WIDE)
    assert f32(checkpoint.tensors["model.norm.weight"].decode()) == changed.tensors["model.norm.weight"].data
