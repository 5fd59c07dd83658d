"""Tiny Qwen2 checkpoints with random weights, in memory or as files, of any mix of block types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from text.synthetic import small_vocabulary

from aprjax.blocks import encode
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.apr_writer import write_apr
from aprjax.checkpoint.types import Checkpoint, EncodedTensor, ModelConfig, Vocabulary, canonical_tensor_shapes

VOCABULARY = small_vocabulary()
CONFIG = ModelConfig(
    architecture="qwen2",
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=len(VOCABULARY.tokens),
    max_position_embeddings=512,
    rope_theta=1e6,
    rope_pairing="neox",
    rms_norm_eps=1e-6,
)


def random_values(config: ModelConfig, *, seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """Weights of the size a trained model has: projections keep the scale of their input, norms are near one."""
    generator = np.random.default_rng(seed)
    values = {}
    for name, shape in canonical_tensor_shapes(config).items():
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith("bias"):
            values[name] = generator.normal(0, 0.5, shape)
        elif len(shape) == 1:
            values[name] = generator.normal(1, 0.1, shape)
        else:
            values[name] = generator.normal(0, shape[1] ** -0.5, shape)
        if name == "model.embed_tokens.weight":
            # As small as a real Qwen2's (rms about 0.015), so that the norm's epsilon shows.
            values[name] = generator.normal(0, 0.015, shape)
    return {name: value.astype(np.float32) for name, value in values.items()}


def encoded(values: Mapping[str, np.ndarray], types: Mapping[str, str] | None = None) -> dict[str, EncodedTensor]:
    """Encoded tensors; `types` gives block types by a part of the name, `""` standing for every matrix."""
    tensors = {}
    for name, value in values.items():
        block_type = "F32"
        if value.ndim == 2:
            for part, wanted in (types or {}).items():
                if part in name:
                    block_type = wanted
        tensors[name] = EncodedTensor(name, value.shape, block_type, encode(block_type, value), stored_name=name)
    return tensors


def tiny_checkpoint(
    config: ModelConfig = CONFIG,
    *,
    seed: int = 0,
    tied: bool = False,
    types: Mapping[str, str] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> Checkpoint:
    """A checkpoint in memory."""
    tensors = encoded(values or random_values(config, seed=seed, tied=tied), types)
    return Checkpoint(Path("tiny.gguf"), "gguf", config, tensors, VOCABULARY, None, {})


def write_tiny(path: Path, checkpoint: Checkpoint, *, vocabulary: Vocabulary | None = VOCABULARY) -> Checkpoint:
    """The checkpoint as an `.apr` file, opened again."""
    tensors = dict(checkpoint.tensors)
    if "lm_head.weight" not in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = replace(embedding, name="lm_head.weight")
    write_apr(path, config=checkpoint.config, tensors=tensors.values(), vocabulary=vocabulary, allow_any_type=True)
    return open_checkpoint(path)


def with_tensor(checkpoint: Checkpoint, name: str, values: np.ndarray, block_type: str | None = None) -> Checkpoint:
    """The checkpoint with one tensor's values exchanged, encoded as it was unless told otherwise."""
    old = checkpoint.tensors[name]
    kind = block_type or old.block_type
    changed = EncodedTensor(name, values.shape, kind, encode(kind, np.ascontiguousarray(values, np.float32)))
    return replace(checkpoint, tensors={**checkpoint.tensors, name: changed})
