"""The words every reader, writer and analysis shares: `Checkpoint`, `EncodedTensor`, `Finding`.

A reader never decodes a tensor and never trusts a length that it has not checked against the file.
What it can read but would not have written becomes a `Finding`; what it cannot read is a
`CheckpointError`, which says what was expected, what was found, where, and the likely fix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aprjax.blocks import block_format, byte_size, dequantize

Severity = Literal["info", "warning", "error"]
FileFormat = Literal["gguf", "apr", "safetensors"]
# How a head's channels are paired for the rotation: "neox" pairs i with i + head_dim/2 (Qwen2),
# "norm" pairs 2i with 2i + 1. APR writes them as rope_type 2 and 0.
RopePairing = Literal["neox", "norm"]


class CheckpointError(Exception):
    """A file that cannot be read as a checkpoint (exit code 4 at the command line).

    Args:
        message: what was expected and what was found.
        file: path of the file.
        tensor: the tensor concerned, if there is one.
        offset: byte offset in the file at which the fault was met.
        fix: what the user can most likely do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.offset = offset
        self.fix = fix
        where = [str(file)] if file is not None else []
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if offset is not None:
            where.append(f"offset {offset}")
        text = f"{', '.join(where)}: {message}" if where else message
        super().__init__(f"{text}. Likely fix: {fix}" if fix else text)


class UnmeasurableError(CheckpointError):
    """Inputs that can be read and yet leave nothing to compare: other tokens, lacking stages, NaN (exit code 3)."""


@dataclass(frozen=True)
class Finding:
    """One deviation met while reading or comparing files.

    `id` is a stable slug (`"apr-header-crc-zero"`); `reference` names upstream's ids for the fault
    (`"GH-239, GH-250"`), where it has any.
    """

    id: str
    severity: Severity
    message: str
    tensor: str | None = None
    offset: int | None = None
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it lies in its file: still encoded, memory-mapped, undecoded.

    Attributes:
        name: canonical (Hugging Face) name, `model.layers.3.mlp.gate_proj.weight`.
        shape: row-major, `(out_features, in_features)` for matrices.
        block_type: a name from `aprjax.blocks` (`"Q4_K"`, `"F32"`, …).
        data: `uint8[bytes]`, a read-only view of the file. Rows follow each other without padding,
            unless `row_padded` says that each row was padded to whole blocks.
        offset: absolute offset of the first byte in `file`.
        file: the file that holds the bytes (one of several, for split checkpoints).
        stored_name: the name in the file (`blk.3.ffn_gate.weight`).
        row_padded: rows are zero-padded to whole blocks (apr-format.md 4.4).
    """

    name: str
    shape: tuple[int, ...]
    block_type: str
    data: np.ndarray
    offset: int = 0
    file: str = ""
    stored_name: str = ""
    row_padded: bool = False

    def __post_init__(self) -> None:
        expected = byte_size(self.block_type, self.shape, row_padded=self.row_padded)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != expected:
            raise CheckpointError(
                f"{self.block_type} of shape {list(self.shape)} takes {expected} bytes, found {self.data.nbytes}",
                file=self.file,
                tensor=self.name,
                offset=self.offset,
                fix="the block type or the shape in the index is wrong, or the file is truncated",
            )

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def decode(self) -> np.ndarray:
        """All values, `float32[*shape]`."""
        return dequantize(self.block_type, self.data, self.shape, row_padded=self.row_padded)

    def decode_rows(self, rows: slice | np.ndarray) -> np.ndarray:
        """The values of some rows (first axis), `float32[rows, *shape[1:]]`, without decoding the others.

        Raises:
            CheckpointError: a row does not begin at a block boundary (flat AprQ4/AprQ8, or a
                flat K-quant whose width is no multiple of 256).
        """
        packed = self.packed()[rows]
        return dequantize(
            self.block_type,
            np.ascontiguousarray(packed).reshape(-1),
            (packed.shape[0], *self.shape[1:]),
            row_padded=self.row_padded,
        )

    def packed(self) -> np.ndarray:
        """The blocks by row, `uint8[rows, blocks, block_bytes]` (a view). For 1-D tensors `rows` is 1.

        Raises:
            CheckpointError: rows do not begin at block boundaries.
        """
        blocks = block_format(self.block_type)
        rows = self.shape[0] if len(self.shape) > 1 else 1
        width = self.size // rows if rows else 0
        if rows == 0 or blocks.tensor_scale or (not self.row_padded and width % blocks.block_size):
            raise CheckpointError(
                f"{self.block_type} of shape {list(self.shape)} has no whole blocks per row",
                file=self.file,
                tensor=self.name,
                offset=self.offset,
                fix="re-convert with a type whose block size divides the row width",
            )
        return self.data.reshape(rows, -1, blocks.block_bytes)

    def sha256(self) -> str:
        """SHA-256 of the encoded bytes."""
        return hashlib.sha256(self.data.data).hexdigest()


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions and constants of a Qwen2 checkpoint (arXiv:2407.10671; HF `Qwen2Config`)."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_pairing: RopePairing
    rms_norm_eps: float

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges as the checkpoint holds them; the index of a token is its id.

    `token_types` uses ggml's numbers (1 normal, 3 control, 4 user-defined, 5 unused, 6 byte) or is
    empty where the container has none. `add_bos` is `None` where the container does not say.
    """

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    token_types: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos: bool | None = None
    pre_tokenizer: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened model file: lazy, memory-mapped, still encoded. `aprjax.open(path)` makes one.

    `tensors` is keyed by canonical (Hugging Face) name, in the order of the file. `metadata` holds
    the container's own key-value pairs, unchanged. `digest` is what `sha256` gives of a checkpoint that no file
    holds (`aprjax.checkpoint.altered`).
    """

    path: Path
    format: FileFormat
    config: ModelConfig
    tensors: Mapping[str, EncodedTensor]
    vocabulary: Vocabulary | None
    chat_template: str | None
    metadata: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    files: tuple[Path, ...] = field(default=())
    digest: str = ""

    def sha256(self) -> str:
        """SHA-256 of the file; of several files: of the `sha256sum` lines of all, in order. Cached."""
        return self.digest or self._sha256

    @cached_property
    def _sha256(self) -> str:
        digests = [(file.name, file_sha256(file)) for file in (self.files or (self.path,))]
        if len(digests) == 1:
            return digests[0][1]
        listing = "".join(f"{digest}  {name}\n" for name, digest in digests)
        return hashlib.sha256(listing.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path.name}: {self.format}, {len(self.tensors)} tensors>"

    def _repr_html_(self) -> str:
        from aprjax.checkpoint.html import summary_html

        return summary_html(self)

    def tied_head(self) -> bool:
        """Whether the output head is the embedding: absent, or byte-identical to it."""
        head = self.tensors.get("lm_head.weight")
        embedding = self.tensors["model.embed_tokens.weight"]
        if head is None:
            return True
        return (
            head.block_type == embedding.block_type
            and head.shape == embedding.shape
            and bool(np.array_equal(head.data, embedding.data))
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_tensor_names(config: ModelConfig) -> tuple[str, ...]:
    """The names a complete Qwen2 has (12 per layer, embedding, final norm, head), in execution order."""
    names = ["model.embed_tokens.weight"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        names.append(prefix + "input_layernorm.weight")
        names += [f"{prefix}self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
        names += [prefix + "self_attn.o_proj.weight", prefix + "post_attention_layernorm.weight"]
        names += [f"{prefix}mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    return (*names, "model.norm.weight", "lm_head.weight")


def canonical_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape `(out, in)` of every name in `canonical_tensor_names`."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    widths = {
        "q": config.num_heads * config.head_dim,
        "k": config.num_kv_heads * config.head_dim,
        "v": config.num_kv_heads * config.head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in canonical_tensor_names(config):
        leaf = name.split(".")[-2]
        if leaf in ("embed_tokens", "lm_head"):
            shapes[name] = (config.vocab_size, hidden)
        elif leaf.endswith(("layernorm", "norm")):
            shapes[name] = (hidden,)
        elif leaf[0] in widths and leaf[1:] == "_proj":
            width = widths[leaf[0]]
            shapes[name] = (width,) if name.endswith("bias") else (width, hidden)
        elif leaf == "o_proj":
            shapes[name] = (hidden, widths["q"])
        elif leaf == "down_proj":
            shapes[name] = (hidden, ffn)
        else:
            shapes[name] = (ffn, hidden)
    return shapes
