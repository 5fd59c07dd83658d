"""Encoders and activation quantizers: byte for byte what ggml writes."""

from __future__ import annotations

import ctypes

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.blocks import FORMATS, dequantize, encode
from aprjax.blocks.activations import QUANTIZERS

from .support import ggml_quantize, value_cases

CASES = value_cases(np.random.default_rng(5))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_bytes_equal_ggml(name, case, llama_library):
    expected = ggml_quantize(llama_library.base, name, CASES[case], suffix="_ref")
    np.testing.assert_array_equal(encode(name, CASES[case]).reshape(expected.shape), expected)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", [case for case in CASES if case != "huge"])
@pytest.mark.parametrize("name", ["Q8_0", "Q8_1", "Q8_K"])
def test_activations_equal_ggml(name, case, llama_library):
    values = CASES[case]
    written = ggml_quantize(llama_library.cpu, name, values, suffix="")
    fields = FORMATS[name].unpack(written)
    jitted = jax.jit(QUANTIZERS[name])
    for blocks in (QUANTIZERS[name](values), jitted(values)):
        np.testing.assert_array_equal(np.asarray(blocks.codes).reshape(len(written), -1), fields.codes[:, 0])
        scale = np.asarray(blocks.scale).reshape(-1)
        np.testing.assert_array_equal(scale.view(np.uint32), fields.scale.view(np.uint32))
        if name == "Q8_1":
            sums = np.ascontiguousarray(written[:, 2:4]).view("<f2")[:, 0].astype(np.float32)
            np.testing.assert_array_equal(np.asarray(blocks.sums).reshape(-1), sums)
        if name == "Q8_K":
            sums = np.ascontiguousarray(written[:, 260:292]).view("<i2")
            np.testing.assert_array_equal(np.asarray(blocks.sums).reshape(-1, 16), sums)


@given(st.integers(0, 2**32 - 1), st.floats(-30, 10))
def test_activation_codes_are_sound(seed, exponent):
    """Codes stay within +-127, the largest element gets one of them, and the sums are the sums."""
    values = np.random.default_rng(seed).normal(size=(3, 512)).astype(np.float32) * np.float32(10**exponent)
    for name, quantize in QUANTIZERS.items():
        blocks = quantize(values)
        codes = blocks.codes.astype(np.int32)
        assert np.abs(codes).max() == 127
        if name == "Q8_K":
            np.testing.assert_array_equal(codes.reshape(3, 2, 16, 16).sum(-1), blocks.sums)
            grouped = values.reshape(3, 2, 256)
            # Half a step, and a little for the rounding of the scale itself.
            assert (np.abs(codes * blocks.scale[..., None] - grouped) <= np.abs(blocks.scale[..., None]) * 0.501).all()


def test_bfloat16_rounds_as_ml_dtypes_does():
    rng = np.random.default_rng(6)
    words = np.concatenate([rng.integers(0, 2**32, 100_000, dtype=np.uint32), np.arange(0, 2**32, 1 << 15, np.uint32)])
    values = words.view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(encode("BF16", values).view("<u2"), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(dequantize("BF16", encode("BF16", np.array([np.nan], np.float32)), (1,)))[0]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_float_rows_equal_ggml(name, llama_library):
    words = np.random.default_rng(7).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = words.view(np.float32)
    values = np.ascontiguousarray(values[~np.isnan(values)])
    out = np.zeros(values.size, "<u2")
    routine = llama_library.base[{"F16": "ggml_fp32_to_fp16_row", "BF16": "ggml_fp32_to_bf16_row"}[name]]
    routine(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(values.size))
    np.testing.assert_array_equal(encode(name, values).view("<u2"), out)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "AprQ4", "AprQ8"])
def test_non_finite_values_are_refused_where_scales_are_shared(name):
    for bad in (np.nan, np.inf, -np.inf):
        values = np.zeros(256, np.float32)
        values[7] = bad
        with pytest.raises(ValueError, match=rf"{name} cannot hold .* \(element 7 in row-major order\)"):
            encode(name, values)


def test_types_without_an_encoder_say_so():
    with pytest.raises(ValueError, match="Q5_K has no encoder"):
        encode("Q5_K", np.zeros(256, np.float32))


@given(
    st.sampled_from(["Q8_0", "Q4_K", "Q6_K", "AprQ4", "AprQ8", "F16", "F32"]), st.integers(1, 600), st.integers(0, 99)
)
def test_round_trips_are_close(name, size, seed):
    values = np.random.default_rng(seed).uniform(-1, 1, size).astype(np.float32)
    back = dequantize(name, encode(name, values), (size,))
    # Values reach 1. Half a step of the code where codes are rounded against the scale as it is; a whole step
    # for Q4_K and Q6_K, whose group scales are rounded to 6 and 8 bits as well. On top, the float16 scale.
    step = {"Q8_0": 0.5 / 127, "Q4_K": 2 / 15, "Q6_K": 2 / 62, "AprQ4": 0.5 / 7, "AprQ8": 0.5 / 127}.get(name, 0)
    bound = step + 2**-11
    assert np.abs(back - values).max() <= bound


@pytest.mark.real_model
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K"])
def test_real_rows_encode_as_ggml_does(name, model_path, llama_library):
    import aprjax

    tensors = aprjax.open(model_path("qwen2.5-coder-1.5b")).tensors
    for leaf in ("mlp.down_proj", "self_attn.v_proj", "mlp.gate_proj"):
        values = tensors[f"model.layers.3.{leaf}.weight"].decode_rows(slice(0, 128))
        expected = ggml_quantize(llama_library.base, name, values, suffix="_ref")
        np.testing.assert_array_equal(encode(name, values).reshape(expected.shape), expected)
