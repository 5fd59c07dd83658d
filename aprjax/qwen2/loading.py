"""From a `Checkpoint` to modules, one layer at a time, weights still encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import numpy as np

from aprjax.blocks import block_format
from aprjax.blocks.relay import Relaid, relay
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor, canonical_tensor_shapes
from aprjax.qwen2.modules import Attention, DecoderLayer, FeedForward, Linear, PackedWeight, RMSNorm
from aprjax.qwen2.sharding import SplitRelaid, current_mesh, place, split_relay

ARCHITECTURES = ("qwen2",)


def require_runnable(checkpoint: Checkpoint) -> None:
    """Checks that every weight a Qwen2 needs is there with the shape that the config implies.

    Missing biases are allowed (they count as zero, which a finding says); a missing head is the
    embedding.

    Raises:
        CheckpointError: naming the first tensor that is missing or has another shape.
    """
    config = checkpoint.config
    if config.architecture.lower() not in ARCHITECTURES:
        raise CheckpointError(
            f"expected the architecture qwen2, found {config.architecture!r}",
            file=checkpoint.path,
            fix="aprjax runs Qwen2 models (Qwen2, Qwen2.5, Qwen2.5-Coder)",
        )
    for name, shape in canonical_tensor_shapes(config).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            if name.endswith(".bias") or name == "lm_head.weight":
                continue
            raise CheckpointError(
                "the tensor is missing",
                file=checkpoint.path,
                tensor=name,
                fix="re-import the model; `python -m aprjax inspect` lists what the file holds",
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"expected shape {list(shape)} from the config, found {list(tensor.shape)}",
                file=checkpoint.path,
                tensor=name,
                offset=tensor.offset,
                fix="the config or the tensor's shape is wrong; `python -m aprjax inspect` shows both",
            )


def pack(tensor: EncodedTensor) -> PackedWeight:
    """The matrix for computing, still encoded; decoded to float32 where its type has no computing layout.

    Inside a `use_mesh` its rows are split over those devices.
    """
    rows, columns = tensor.shape
    blocks = block_format(tensor.block_type)
    if tensor.row_padded or (not blocks.flat and columns % blocks.block_size == 0):
        with contextlib.suppress(ValueError):  # a type without a computing layout: IQ*, integers
            return PackedWeight(_laid_out(tensor.block_type, tensor.packed()), (rows, columns))
    values = np.ascontiguousarray(tensor.decode()).view(np.uint8).reshape(rows, columns, 4)
    return PackedWeight(_laid_out("F32", values), (rows, columns))


def _laid_out(name: str, packed: np.ndarray) -> Relaid | SplitRelaid:
    mesh = current_mesh()
    return jax.device_put(relay(name, packed)) if mesh is None else split_relay(name, packed, mesh)


def load_layer(
    checkpoint: Checkpoint, layer: int, packer: Callable[[EncodedTensor], PackedWeight] | None = None
) -> DecoderLayer:
    """Layer `layer` of the checkpoint, its matrices encoded, its norms and biases in float32.

    `packer` stands in for `pack`, for callers that already hold some of the matrices.
    """
    config = checkpoint.config
    prefix = f"model.layers.{layer}."

    def linear(name: str, bias: bool = False) -> Linear:
        vector = checkpoint.tensors.get(f"{prefix}{name}.bias") if bias else None
        return Linear(
            (packer or pack)(checkpoint.tensors[f"{prefix}{name}.weight"]),
            None if vector is None else place(vector.decode(), current_mesh()),
        )

    def norm(name: str) -> RMSNorm:
        return load_norm(checkpoint, f"{prefix}{name}.weight")

    attention = Attention(
        linear("self_attn.q_proj", bias=True),
        linear("self_attn.k_proj", bias=True),
        linear("self_attn.v_proj", bias=True),
        linear("self_attn.o_proj"),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_pairing=config.rope_pairing,
    )
    mlp = FeedForward(linear("mlp.gate_proj"), linear("mlp.up_proj"), linear("mlp.down_proj"))
    return DecoderLayer(norm("input_layernorm"), attention, norm("post_attention_layernorm"), mlp)


def load_norm(checkpoint: Checkpoint, name: str) -> RMSNorm:
    """A norm with the checkpoint's epsilon."""
    mesh = current_mesh()
    weight = place(checkpoint.tensors[name].decode(), mesh)
    # The epsilon is an array, not a constant: files that differ in it share one compiled program.
    return RMSNorm(weight, place(np.float32(checkpoint.config.rms_norm_eps), mesh))


def head_tensor(checkpoint: Checkpoint) -> EncodedTensor:
    """The output head: `lm_head.weight`, or the embedding where the head is tied and absent."""
    return checkpoint.tensors.get("lm_head.weight") or checkpoint.tensors["model.embed_tokens.weight"]


def embed(checkpoint: Checkpoint, tokens: list[int] | np.ndarray) -> np.ndarray:
    """The embedding rows of `tokens`, `float32[position, hidden]`, decoded from the file's blocks.

    Raises:
        CheckpointError: a token id lies outside the embedding.
    """
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    ids = np.asarray(tokens, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= embedding.shape[0]):
        raise CheckpointError(
            f"token id {int(ids.max())} lies outside the embedding's {embedding.shape[0]} rows",
            file=checkpoint.path,
            tensor=embedding.name,
            fix="the tokens belong to another vocabulary",
        )
    if block_format(embedding.block_type).flat:
        return embedding.decode()[ids]
    unique, inverse = np.unique(ids, return_inverse=True)
    return embedding.decode_rows(unique)[inverse]
