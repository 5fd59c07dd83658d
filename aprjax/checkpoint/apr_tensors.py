"""From index entries to `EncodedTensor`s: names, fused projections, shape order, encodings (apr-format.md 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aprjax.blocks import byte_size
from aprjax.checkpoint.apr_container import AprContainer
from aprjax.checkpoint.apr_dtypes import resolve
from aprjax.checkpoint.apr_findings import listing, shown
from aprjax.checkpoint.apr_format import IndexEntry
from aprjax.checkpoint.names import gguf_to_hf, is_gguf_name
from aprjax.checkpoint.types import CheckpointError, EncodedTensor, ModelConfig, canonical_tensor_shapes

# Modules of a layer whose names some old files use without what encloses them (GH-190, PMAT-205, PMAT-222).
_ENCLOSING = {
    **{f"{projection}_proj": "self_attn." for projection in ("q", "k", "v", "o", "qkv")},
    **{f"{projection}_proj": "mlp." for projection in ("gate", "up", "down")},
    "input_layernorm": "",
    "post_attention_layernorm": "",
}
_BARE_LAYER = re.compile(r"(?:layers\.)?([0-9]+)\.(.+)", re.DOTALL)
_BARE_GLOBALS = ("embed_tokens.weight", "norm.weight")
_FUSED = re.compile(r"(model\.layers\.[0-9]+\.)(?:self_attn\.qkv_proj|attn_qkv)\.(weight|bias)")


@dataclass(frozen=True)
class NamedEntry:
    """An index entry and the canonical name of its tensor."""

    name: str
    entry: IndexEntry


def canonical_name(stored: str) -> str:
    """The Hugging Face name of a tensor under any of the spellings that APR files use."""
    if is_gguf_name(stored):
        return gguf_to_hf(stored)
    if stored in _BARE_GLOBALS:
        return f"model.{stored}"
    if match := _BARE_LAYER.fullmatch(stored):
        rest = match[2]
        return f"model.layers.{match[1]}.{_ENCLOSING.get(rest.split('.')[0], '')}{rest}"
    return stored


def name_entries(container: AprContainer) -> dict[str, NamedEntry]:
    """The entries by canonical name, in the order of the index; odd spellings go to the container's log."""
    named: dict[str, NamedEntry] = {}
    gguf, bare = [], []
    log = container.log
    for entry in container.entries:
        name = canonical_name(entry.name)
        if is_gguf_name(entry.name):
            gguf.append(entry.name)
        elif name != entry.name:
            bare.append(entry.name)
        previous = named.get(name)
        if previous is not None and previous.entry.name != entry.name:
            kept = previous if previous.name == previous.entry.name else NamedEntry(name, entry)
            log.add(
                "apr-two-spellings",
                "error",
                f"{shown(previous.entry.name)} and {shown(entry.name)} are the same tensor; {shown(kept.entry.name)} "
                "counts, as in realizar, which looks for the Hugging Face name first",
                tensor=name,
                offset=entry.position,
            )
            named[name] = kept
        else:
            named[name] = NamedEntry(name, entry)
    if gguf:
        log.add(
            "apr-gguf-names",
            "info",
            f"{len(gguf)} tensors have GGUF names ({listing(gguf)}), as realizar's converter leaves them; its loaders "
            "look for both, aprender's `export` and `diff` do not",
            reference="apr-format.md 4.1",
        )
    if bare:
        log.add(
            "apr-bare-names",
            "warning",
            f"{len(bare)} tensors lack the prefix 'model.' or their module ({listing(bare)}); current loaders do not "
            "find them",
            reference="GH-190, PMAT-205, PMAT-222",
        )
    return named


def stored_shapes(named: Mapping[str, NamedEntry]) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape as stored, as evidence for the configuration."""
    return {name: item.entry.shape for name, item in named.items()}


def encode_tensors(
    container: AprContainer, named: Mapping[str, NamedEntry], config: ModelConfig
) -> dict[str, EncodedTensor]:
    """Every tensor with its encoding resolved and its matrix in `(out, in)` order.

    Raises:
        CheckpointError: a tensor reaches beyond the end of the file, or no block type fits its size.
    """
    expected = canonical_tensor_shapes(config)
    tensors: dict[str, EncodedTensor] = {}
    reversed_names: list[str] = []
    for name, item in named.items():
        fused = _FUSED.fullmatch(name)
        wanted = _fused_shape(config, fused[2]) if fused else expected.get(name)
        shape = item.entry.shape
        if wanted is not None and shape != wanted and len(shape) == 2 and shape[::-1] == wanted:
            shape = wanted
            reversed_names.append(name)
        tensor = _encode(container, item.entry, name, shape)
        pieces = _split(tensor, fused[1], fused[2], config, container) if fused and shape == wanted else (tensor,)
        for piece in pieces:
            if piece.name in tensors or (fused and piece.name in named):
                continue
            tensors[piece.name] = piece
    if reversed_names:
        container.log.add(
            "apr-shapes-reversed",
            "error",
            f"{len(reversed_names)} matrices have their shape in GGUF's order [in, out] ({listing(reversed_names)}), "
            "as `apr convert` passes GGUF shapes through; aprjax turns them. aprender computes with the shape as it "
            "stands, realizar infers a wrong head_dim from a reversed q_proj",
            tensor=reversed_names[0],
            reference="GH-187, GH-208, #351, BUG-IMPORT-001, GH-278, GH-479",
        )
    return tensors


def _encode(container: AprContainer, entry: IndexEntry, name: str, shape: tuple[int, ...]) -> EncodedTensor:
    data = container.tensor_bytes(entry)
    encoding = resolve(entry, shape, file=container.path, log=container.log)
    return EncodedTensor(
        name,
        shape,
        encoding.block_type,
        data,
        offset=container.header.data_offset + entry.offset,
        file=str(container.path),
        stored_name=entry.name,
        row_padded=encoding.row_padded,
    )


def _qkv_widths(config: ModelConfig) -> tuple[int, int, int]:
    return (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )


def _fused_shape(config: ModelConfig, kind: str) -> tuple[int, ...]:
    rows = sum(_qkv_widths(config))
    return (rows,) if kind == "bias" else (rows, config.hidden_size)


def _split(
    tensor: EncodedTensor, prefix: str, kind: str, config: ModelConfig, container: AprContainer
) -> tuple[EncodedTensor, ...]:
    """q, k and v of a fused projection, whose rows follow each other, as views of its bytes."""
    columns = tensor.shape[1:]
    rest, start = tensor.nbytes, 0
    pieces: list[EncodedTensor] = []
    for projection, rows in zip("qkv", _qkv_widths(config), strict=True):
        shape = (rows, *columns)
        size = byte_size(tensor.block_type, shape, row_padded=tensor.row_padded)
        if size > rest:
            break
        pieces.append(
            EncodedTensor(
                f"{prefix}self_attn.{projection}_proj.{kind}",
                shape,
                tensor.block_type,
                tensor.data[start : start + size],
                offset=tensor.offset + start,
                file=tensor.file,
                stored_name=tensor.stored_name,
                row_padded=tensor.row_padded,
            )
        )
        start, rest = start + size, rest - size
    whole_rows = byte_size(tensor.block_type, (1, *columns), row_padded=tensor.row_padded) * tensor.shape[0]
    if len(pieces) < 3 or rest or whole_rows != tensor.nbytes:
        raise CheckpointError(
            f"q, k and v are fused in one {tensor.block_type} tensor whose blocks run across its rows, so it cannot be "
            "split",
            file=container.path,
            tensor=tensor.stored_name,
            offset=tensor.offset,
            fix="re-convert the model with separate q, k and v projections",
        )
    container.log.add(
        "apr-qkv-fused",
        "warning",
        "q, k and v are fused in one tensor; aprjax splits its rows. AprTransformer reads it, realizar's `from_apr` "
        "does not",
        tensor=tensor.name,
        offset=tensor.offset,
        reference="apr-format.md 4.1",
    )
    return tuple(pieces)


def looks_zero(data: np.ndarray) -> bool:
    """Whether all bytes are zero; a few windows decide in nearly every case, so that opening stays lazy."""
    # One page at the start, the middle and the end: a weight matrix has non-zero bytes in each.
    window = 4096
    starts = (0, max(0, data.size // 2 - window // 2), max(0, data.size - window))
    if any(data[start : start + window].any() for start in starts):
        return False
    return not any(data[start : start + (1 << 24)].any() for start in range(0, data.size, 1 << 24))
