"""Tiny APR files for tests: a sound draft, changed at will, then written."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.blocks import FORMATS
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.apr_writer import RawEntry, write_container
from aprjax.checkpoint.types import Checkpoint, ModelConfig, canonical_tensor_shapes

TINY = ModelConfig(
    architecture="qwen2",
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=12,
    vocab_size=20,
    max_position_embeddings=64,
    rope_theta=1e6,
    rope_pairing="neox",
    rms_norm_eps=1e-6,
)
# Rows of whole super-blocks, for K-quants.
WIDE = replace(TINY, hidden_size=256, num_layers=1, head_dim=128, intermediate_size=256)
TOKENS = ["a", "b", "c", "ab", "abc", *(f"t{i}" for i in range(12)), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Part:
    """A tensor of a draft."""

    dtype: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


@dataclass
class Draft:
    """What a file will hold; `write` adds no check of its own."""

    metadata: dict[str, Any]
    tensors: dict[str, Part]
    switches: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, **switches: Any) -> Path:
        with path.open("wb") as stream:
            write_container(stream, metadata=self.metadata, entries=entries_of(self), **self.switches | switches)
        return path

    def read(self, path: Path, **switches: Any) -> Checkpoint:
        return read_apr(self.write(path, **switches))

    def rename(self, rename: Callable[[str], str]) -> None:
        self.tensors = {rename(name): part for name, part in self.tensors.items()}


def entries_of(parts: Draft) -> list[RawEntry]:
    """The draft's tensors as the writer takes them."""
    return [
        RawEntry(name, part.dtype, part.shape, len(part.data), lambda part=part: (part.data,), part.offset)
        for name, part in parts.tensors.items()
    ]


def f32(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f4").tobytes()


def draft(config: ModelConfig = TINY, seed: int = 0) -> Draft:
    """A sound file's parts: every tensor float32, every key in its place."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in canonical_tensor_shapes(config).items():
        values = random.standard_normal(shape, np.float32)
        if "norm" in name:
            values = 1 + 0.1 * values
        tensors[name] = Part(0, shape, f32(values))
    metadata = {
        "model_type": "qwen2",
        "license": None,
        "data_source": None,
        "data_license": None,
        "architecture": "qwen2",
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_type": 2,
        "rms_norm_eps": config.rms_norm_eps,
        "head_dim": config.head_dim,
        "chat_template": "{{ messages[0].content }}",
        "tokenizer.vocabulary": TOKENS,
        "tokenizer.merges": ["a b", "ab c"],
        "tokenizer.bos_token_id": 17,
        "tokenizer.eos_token_id": 19,
        "tokenizer.pre_type": "qwen2",
        "tokenizer.model": "gpt2",
    }
    return Draft(metadata, tensors)


def finding_ids(checkpoint: Checkpoint) -> set[str]:
    return {finding.id for finding in checkpoint.findings}


def random_blocks(name: str, count: int, seed: int = 0) -> bytes:
    """Random blocks of a quantized type, their float16 scales made small and finite."""
    form = FORMATS[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (count, form.block_bytes), np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q5_K": (0, 2), "Q4_0": (0,)}.get(name, ()):
        blocks[:, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return blocks.tobytes()


def patch_header(path: Path, at: int, new: bytes, *, renew: bool = True) -> None:
    """Overwrite header bytes; `renew` makes the header's checksum right again."""
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    if renew:
        data[40:44] = struct.pack("<I", zlib.crc32(bytes(data[44:64]), zlib.crc32(bytes(data[:40]))))
    path.write_bytes(data)


def compact(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode()
