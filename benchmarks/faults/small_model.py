"""A small Qwen2 with random weights, written by gguf-py: what the fault bench runs hundreds of cases on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from codec import encode


@dataclass(frozen=True)
class Shape:
    """Dimensions; every width is a multiple of a K-quant's block."""

    hidden: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 512
    vocabulary: int = 320


TINY = Shape()
# As many key-value heads as heads: the only kind of model in which q and k can change places.
TINY_MHA = Shape(kv_heads=4, layers=2)
_TYPES = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"}


def write_small(path: Path, shape: Shape = TINY, *, seed: int = 0) -> Path:
    """Writes the model; its matrices are Q4_K and Q6_K, as llama.cpp mixes them in Q4_K_M."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(None, "qwen2")
    kinds = gguf.GGUFValueType
    numbers = {
        "block_count": shape.layers,
        "context_length": 512,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
    }
    for key, value in numbers.items():
        writer.add_key_value(f"qwen2.{key}", value, kinds.UINT32)
    writer.add_key_value("qwen2.rope.freq_base", 1e6, kinds.FLOAT32)
    writer.add_key_value("qwen2.attention.layer_norm_rms_epsilon", 1e-6, kinds.FLOAT32)
    tokens = [f"<{number}>" for number in range(shape.vocabulary)]
    writer.add_key_value("tokenizer.ggml.model", "gpt2", kinds.STRING)
    writer.add_key_value("tokenizer.ggml.pre", "qwen2", kinds.STRING)
    writer.add_key_value("tokenizer.ggml.tokens", tokens, kinds.ARRAY)
    writer.add_key_value("tokenizer.ggml.merges", ["a b"], kinds.ARRAY)
    for name, values in _values(shape, random).items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        kind = _TYPES.get(leaf, "Q4_K")
        data = np.frombuffer(encode(values, kind), np.uint8).reshape(len(values), -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(shape: Shape, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Projections that keep the scale of their input, norms near one, an embedding as small as a real Qwen2's."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: dict[str, np.ndarray] = {"token_embd.weight": random.normal(0, 0.015, (shape.vocabulary, shape.hidden))}

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, columns**-0.5, (rows, columns))

    for layer in range(shape.layers):
        block = f"blk.{layer}."
        found[block + "attn_norm.weight"] = random.normal(1, 0.1, shape.hidden)
        for leaf, width in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            found[f"{block}{leaf}.weight"] = matrix(width, shape.hidden)
            found[f"{block}{leaf}.bias"] = random.normal(0, 0.5, width)
        found[block + "attn_output.weight"] = matrix(shape.hidden, q)
        found[block + "ffn_norm.weight"] = random.normal(1, 0.1, shape.hidden)
        found[block + "ffn_gate.weight"] = matrix(shape.ffn, shape.hidden)
        found[block + "ffn_up.weight"] = matrix(shape.ffn, shape.hidden)
        found[block + "ffn_down.weight"] = matrix(shape.hidden, shape.ffn)
    found["output_norm.weight"] = random.normal(1, 0.1, shape.hidden)
    found["output.weight"] = matrix(shape.vocabulary, shape.hidden)
    return {name: value.astype(np.float32) for name, value in found.items()}
