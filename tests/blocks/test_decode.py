"""Decoding: NumPy and JAX against ggml's library and against gguf-py."""

from __future__ import annotations

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.blocks import FORMATS, UnknownBlockType, block_format, byte_size, codec, dequantize, encode

from .support import QUANTIZED, SCALE_BYTES, bits, ggml_dequantize, random_blocks

# Zero, subnormals, the smallest normal, ordinary values, the largest, infinities and NaNs, of both signs.
HARD_HALVES = np.array([0x0000, 0x0001, 0x0003, 0x03FF, 0x0400, 0x1234, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01], "<u2")
GGUF_PY = [blocks.name for blocks in FORMATS.values() if blocks.ggml_id is not None and blocks.name in QUANTIZED]
EXOTIC = ["IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"]


def hard_blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    """Random bytes, and random codes under every pair of hard scales."""
    first, end = SCALE_BYTES.get(name, (0, 2))
    halves = np.concatenate([HARD_HALVES, HARD_HALVES | 0x8000])
    pairs = np.stack(np.meshgrid(halves, halves, indexing="ij"), axis=-1).reshape(-1, 2)
    hard = random_blocks(name, (len(pairs),), rng, finite=False)
    hard[:, first:end] = np.ascontiguousarray(pairs[:, : (end - first) // 2]).view(np.uint8)
    return np.concatenate([hard, random_blocks(name, (400,), rng, finite=False)])


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", QUANTIZED)
def test_bits_equal_ggml(name, llama_library):
    blocks = hard_blocks(name, np.random.default_rng(1))
    expected = bits(ggml_dequantize(llama_library.base, name, blocks))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(bits(FORMATS[name].decode(blocks)), expected)
    np.testing.assert_array_equal(bits(jax.jit(FORMATS[name].decode_jax)(blocks)), expected)


@pytest.mark.parametrize("name", GGUF_PY)
def test_bits_equal_gguf_py(name):
    blocks = random_blocks(name, (300,), np.random.default_rng(2))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(bits(FORMATS[name].decode(blocks)), bits(expected))


@pytest.mark.parametrize("name", EXOTIC)
def test_the_exotic_types_have_the_registered_sizes(name):
    blocks = FORMATS[name]
    assert blocks.decode_jax is None
    data = np.random.default_rng(3).integers(0, 120, (3, blocks.block_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        assert dequantize(name, data.reshape(-1), (3, blocks.block_size)).shape == (3, blocks.block_size)


def test_sizes_and_numbers_agree_with_gguf_py():
    for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q1_0":  # gguf-py 0.19 cannot decode it either
            continue
        mine = block_format(int(kind))
        assert mine is block_format(kind.name)
        # gguf-py still counts the Q8_1 of 2023, with two float32 scales; ggml-common.h has 36 bytes.
        assert (mine.block_size, mine.block_bytes) == (elements, 36 if kind.name == "Q8_1" else nbytes)


@pytest.mark.llama_cpp
def test_activation_formats_decode_as_their_codes_times_scale(llama_library):
    rng = np.random.default_rng(4)
    eight = rng.integers(0, 256, (50, 292), dtype=np.uint8)
    eight[:, 0:4] = rng.normal(size=(50, 1)).astype("<f4").view(np.uint8)
    library = llama_library.base
    np.testing.assert_array_equal(bits(FORMATS["Q8_K"].decode(eight)), bits(ggml_dequantize(library, "Q8_K", eight)))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_all_halves_widen_exactly(name):
    patterns = np.arange(65536, dtype="<u2")
    blocks = patterns.view(np.uint8).reshape(-1, 2)
    expected = (
        patterns.view("<f2").astype(np.float32) if name == "F16" else (patterns.astype("<u4") << 16).view(np.float32)
    )
    np.testing.assert_array_equal(bits(FORMATS[name].decode(blocks).reshape(-1)), bits(expected))
    np.testing.assert_array_equal(bits(jax.jit(FORMATS[name].decode_jax)(blocks).reshape(-1)), bits(expected))


@pytest.mark.parametrize("dtype", ["F32", "F64", "I8", "I16", "I32", "I64"])
def test_containers(dtype):
    numpy_type = {"F32": "<f4", "F64": "<f8"}.get(dtype, "<i" + str(int(dtype[1:]) // 8))
    values = np.array([[0, 1, -1], [100, -128, 127]], numpy_type)
    data = values.reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(dequantize(dtype, data, (2, 3)), values.astype(np.float32))


@given(
    name=st.sampled_from([*QUANTIZED, "AprQ4", "AprQ8", "F16", "BF16", "F32"]),
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
    padded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunking_and_padding_do_not_change_values(name, shape, padded, seed):
    blocks = FORMATS[name]
    data = np.random.default_rng(seed).integers(0, 100, byte_size(name, shape, row_padded=padded), dtype=np.uint8)
    whole = blocks.decode(data[blocks.header_bytes :].reshape(-1, blocks.block_bytes))
    if blocks.tensor_scale:
        whole = whole * data[:4].view("<f4")[0]
    if padded and shape:
        rows = int(np.prod(shape[:-1]))
        width = -(-shape[-1] // blocks.block_size) * blocks.block_size
        expected = whole.reshape(rows, width)[:, : shape[-1]].reshape(shape)
    else:
        expected = whole.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    before, codec.CHUNK_ELEMENTS = codec.CHUNK_ELEMENTS, 512
    try:
        found = dequantize(name, data, shape, row_padded=padded)
    finally:
        codec.CHUNK_ELEMENTS = before
    assert found.shape == shape
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    ("name", "shape", "padded", "expected"),
    [
        ("F32", (), False, 4),
        ("F32", (0, 7), False, 0),
        ("Q4_K", (2, 896), False, 7 * 144),
        ("Q4_K", (2, 896), True, 8 * 144),
        ("Q8_0", (3, 33), False, 4 * 34),
        ("AprQ4", (5, 7), False, 2 * 18),
        ("AprQ8", (5, 7), False, 4 + 35),
        ("F16", (2**40, 2**40), False, 2**81),
    ],
)
def test_byte_size(name, shape, padded, expected):
    assert byte_size(name, shape, row_padded=padded) == expected


def test_wrong_byte_counts_are_refused():
    with pytest.raises(ValueError, match=r"Q4_K of shape \[2, 256\] takes 288 bytes, found 287"):
        dequantize("Q4_K", np.zeros(287, np.uint8), (2, 256))


def test_unknown_types_name_the_known_ones():
    for asked in ("Q4_Z", 99):
        with pytest.raises(UnknownBlockType, match=rf"{asked!r}; known are F32, F16, Q4_0"):
            block_format(asked)


def test_apr_vectors():
    """The two test vectors of apr-format.md section 5.3."""
    alternating = (np.where(np.arange(32) % 2, -1.0, 1.0) * np.arange(32) / 8).astype(np.float32)
    assert encode("AprQ4", alternating).tobytes().hex() == "6e38887879696a6a5b5b4c4c3d3d2d2e1e1f"
    five = np.array([0, 1, -1, 0.5, 2.54], np.float32)
    assert encode("AprQ8", five).tobytes().hex() == "0ad7a33c0032ce197f"
    np.testing.assert_allclose(dequantize("AprQ8", encode("AprQ8", five), (5,)), five, atol=2.54 / 127 / 2)
    # Interleaved nibbles: value 2i is the low one.
    block = np.zeros(18, np.uint8)
    block[:2] = np.array([1.0], "<f2").view(np.uint8)
    block[2:] = 0x88
    block[2] = 0x9A
    np.testing.assert_array_equal(dequantize("AprQ4", block, (32,))[:3], [2, 1, 0])


@pytest.mark.real_model
@pytest.mark.llama_cpp
@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_real_tensors_decode_as_ggml_does(model, model_path, llama_library):
    import aprjax

    seen = set()
    for tensor in aprjax.open(model_path(model)).tensors.values():
        if tensor.block_type not in QUANTIZED or tensor.block_type in seen:
            continue
        seen.add(tensor.block_type)
        packed = np.ascontiguousarray(tensor.packed()[:256])
        blocks = packed.reshape(-1, packed.shape[-1])
        expected = bits(ggml_dequantize(llama_library.base, tensor.block_type, blocks))
        found = dequantize(tensor.block_type, blocks.reshape(-1), (256, tensor.shape[1]))
        np.testing.assert_array_equal(bits(found).reshape(expected.shape), expected)
        found = jax.jit(FORMATS[tensor.block_type].decode_jax)(blocks)
        np.testing.assert_array_equal(bits(found), expected)
    assert seen >= {"Q4_K", "Q6_K"}
