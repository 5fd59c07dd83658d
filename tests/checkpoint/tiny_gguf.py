"""Tiny Qwen2 models written by gguf-py: the oracle's own hand, so that reader and writer cannot share a mistake."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from aprjax.blocks import FORMATS, byte_size, encode
from aprjax.checkpoint.names import hf_to_gguf
from aprjax.checkpoint.types import ModelConfig, canonical_tensor_shapes

# Widths are whole super-blocks, so that K-quants fit; heads share key-value heads.
TINY = ModelConfig(
    architecture="qwen2",
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=300,
    max_position_embeddings=128,
    rope_theta=1e6,
    rope_pairing="neox",
    rms_norm_eps=1e-6,
)
SPECIAL = {297: "<|endoftext|>", 298: "<|im_start|>", 299: "<|im_end|>"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tiny_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: all bytes, 40 merges, one unused token, three special ones."""
    alphabet = _byte_alphabet()
    merges = [(alphabet[i], alphabet[j]) for i in range(64, 72) for j in range(70, 75)]
    tokens = [*alphabet, *(left + right for left, right in merges), "[PAD296]", *SPECIAL.values()]
    types = [1] * 296 + [5] + [3] * 3
    return tokens, types, [f"{left} {right}" for left, right in merges]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def tiny_tensors(
    config: ModelConfig = TINY,
    *,
    types: Mapping[str, str] | None = None,
    matrix: str = "F16",
    tied: bool = False,
    seed: int = 0,
) -> dict[str, tuple[str, np.ndarray]]:
    """Canonical name -> (block type, encoded bytes). Matrices are of type `matrix` unless `types` says otherwise."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in canonical_tensor_shapes(config).items():
        if tied and name == "lm_head.weight":
            continue
        values = random.standard_normal(shape, dtype=np.float32) * 0.05 + (1.0 if "norm" in name else 0.0)
        block_type = (types or {}).get(name, "F32" if len(shape) == 1 else matrix)
        tensors[name] = (block_type, encoded(block_type, values, random))
    return tensors


def encoded(block_type: str, values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Values in a block type; where there is no encoder, random blocks with small finite scales."""
    if FORMATS[block_type].encode is not None:
        return encode(block_type, values)
    quantize = gguf.GGMLQuantizationType[block_type]
    try:
        return np.ascontiguousarray(gguf.quants.quantize(values, quantize)).reshape(-1).view(np.uint8)
    except NotImplementedError:
        blocks = random.integers(0, 256, byte_size(block_type, values.shape), dtype=np.uint8)
        blocks = blocks.reshape(-1, FORMATS[block_type].block_bytes)
        # 0x1c00 .. 0x1cff: float16 of about 0.004, wherever the scales are.
        for offset in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[block_type]:
            blocks[:, offset + 1] = 0x1C
        return blocks.reshape(-1)


def write_tiny_gguf(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray]] | None = None,
    *,
    config: ModelConfig = TINY,
    extra: Mapping[str, tuple[Any, gguf.GGUFValueType]] | None = None,
    leave_out: tuple[str, ...] = (),
    **writer_options: Any,
) -> Path:
    """Write a model with gguf-py's writer.

    Args:
        path: the file.
        tensors: as `tiny_tensors` returns them.
        config: the model's dimensions.
        extra: further metadata keys, as value and type.
        leave_out: metadata keys not to write.
        writer_options: for `gguf.GGUFWriter` (splitting, for instance).
    """
    tensors = tiny_tensors(config) if tensors is None else tensors
    kinds = gguf.GGUFValueType
    arch = config.architecture
    writer = gguf.GGUFWriter(None, arch, **writer_options)
    tokens, types, merges = tiny_tokens()
    entries: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "general.name": ("Tiny", kinds.STRING),
        "general.file_type": (1, kinds.UINT32),
        f"{arch}.block_count": (config.num_layers, kinds.UINT32),
        f"{arch}.context_length": (config.max_position_embeddings, kinds.UINT32),
        f"{arch}.embedding_length": (config.hidden_size, kinds.UINT32),
        f"{arch}.feed_forward_length": (config.intermediate_size, kinds.UINT32),
        f"{arch}.attention.head_count": (config.num_heads, kinds.UINT32),
        f"{arch}.attention.head_count_kv": (config.num_kv_heads, kinds.UINT32),
        f"{arch}.rope.freq_base": (config.rope_theta, kinds.FLOAT32),
        f"{arch}.attention.layer_norm_rms_epsilon": (config.rms_norm_eps, kinds.FLOAT32),
        "tokenizer.ggml.model": ("gpt2", kinds.STRING),
        "tokenizer.ggml.pre": ("qwen2", kinds.STRING),
        "tokenizer.ggml.tokens": (tokens, kinds.ARRAY),
        "tokenizer.ggml.token_type": (types, kinds.ARRAY),
        "tokenizer.ggml.merges": (merges, kinds.ARRAY),
        "tokenizer.ggml.bos_token_id": (297, kinds.UINT32),
        "tokenizer.ggml.eos_token_id": (299, kinds.UINT32),
        "tokenizer.ggml.padding_token_id": (297, kinds.UINT32),
        "tokenizer.ggml.add_bos_token": (False, kinds.BOOL),
        "tokenizer.chat_template": (TEMPLATE, kinds.STRING),
        **(extra or {}),
    }
    for key, (value, kind) in entries.items():
        if key not in leave_out:
            writer.add_key_value(key, value, kind)
    for name, (block_type, data) in tensors.items():
        shape = canonical_tensor_shapes(config).get(name, (data.size,))
        raw = gguf.GGMLQuantizationType[block_type]
        rows = data.reshape(*shape[:-1], -1)
        if block_type in ("F32", "F16"):
            rows = rows.view({"F32": np.float32, "F16": np.float16}[block_type])
            writer.add_tensor(hf_to_gguf(name), rows)
        else:
            writer.add_tensor(hf_to_gguf(name), rows, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
