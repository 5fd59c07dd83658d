"""What becomes of each tensor in a conversion: copied as it is, widened, left out, or the head made up.

Into APR the default is what `apr import` does (apr-format.md 6.1): F32, F16, Q4_K and Q6_K keep their
bytes; one tensor of a type that APR cannot hold exactly turns the whole model into float32; some
types are refused. `keep_blocks` widens only the tensors that need it. Widening is always to float32:
decoding is defined in float32, so nothing is rounded, where float16 would be exact for few blocks.
Norms and biases become float32 everywhere: realizar reads them as such whatever their dtype says
(4.3), and ggml adds and multiplies them only so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aprjax.blocks import block_format
from aprjax.checkpoint.structure import structure_findings
from aprjax.checkpoint.tensor_plan import PlannedTensor
from aprjax.checkpoint.types import (
    Checkpoint,
    CheckpointError,
    EncodedTensor,
    FileFormat,
    canonical_tensor_names,
)

Dtype = Literal["auto", "F32", "F16", "BF16"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# `apr import` of GGUF, apr-format.md 6.1: kept; the whole model becomes float32; everything else is refused.
IMPORT_KEPT = ("F32", "F16", "Q4_K", "Q6_K")
IMPORT_WIDENS_ALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q5_K")
# What an APR file can hold in a way that all its readers agree on (0).
APR_HOLDS = ("F32", "F16", "BF16", "Q4_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
# Buffers that old versions of transformers saved with the weights; they are computed from the config.
_BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")


@dataclass
class Plan:
    """The tensors of the output, with canonical names in execution order, and what is worth telling."""

    tensors: list[PlannedTensor]
    head: Literal["kept", "synthesized", "dropped", "absent"]
    notes: list[str] = field(default_factory=list)


def plan_conversion(
    checkpoint: Checkpoint, target: FileFormat, *, keep_blocks: bool = False, dtype: Dtype = "auto"
) -> Plan:
    """Decide on every tensor.

    Args:
        checkpoint: the source.
        target: the container to write.
        keep_blocks: into APR: keep Q4_K and Q6_K (and BF16) where `apr import` would widen the model or refuse it.
        dtype: into safetensors: the type of the weights; `"auto"` keeps floats and decodes the rest to F32.

    Raises:
        CheckpointError: tensors are missing or of the wrong shape, or of a type that the policy refuses.
    """
    _refuse_incomplete(checkpoint)
    notes: list[str] = []
    names = [name for name in canonical_tensor_names(checkpoint.config) if name in checkpoint.tensors]
    names += [name for name in checkpoint.tensors if name not in set(names) and not name.endswith(_BUFFERS)]
    if buffers := len(checkpoint.tensors) - len(names):
        notes.append(f"{buffers} buffers that are no weights were left out")
    tensors = {name: checkpoint.tensors[name] for name in names}
    head = _head(checkpoint, target, tensors, notes)
    chosen = _block_types(checkpoint, target, tensors, keep_blocks=keep_blocks, dtype=dtype, notes=notes)
    planned = [PlannedTensor(name, tensor, chosen[name]) for name, tensor in tensors.items()]
    return Plan(planned, head, notes)


def _refuse_incomplete(checkpoint: Checkpoint) -> None:
    """A model that cannot run must not turn into a file that looks like one."""
    for finding in structure_findings(checkpoint.config, checkpoint.tensors):
        if finding.severity == "error":
            raise CheckpointError(
                f"the source cannot be converted: {finding.message}",
                file=checkpoint.path,
                tensor=finding.tensor,
                offset=finding.offset,
                fix="give a complete model",
            )


def _head(
    checkpoint: Checkpoint, target: FileFormat, tensors: dict[str, EncodedTensor], notes: list[str]
) -> Literal["kept", "synthesized", "dropped", "absent"]:
    """Adds the head that APR demands, or takes away one that an importer had added."""
    made_up = checkpoint.format == "apr" and checkpoint.metadata.get("tied_embeddings") is True
    if HEAD not in tensors:
        if target != "apr":
            return "absent"
        tensors[HEAD] = tensors[EMBEDDING]
        notes.append("lm_head.weight is a byte copy of the embedding (tied_embeddings), as `apr import` writes it")
        return "synthesized"
    if not made_up:
        return "kept"
    if not checkpoint.tied_head():
        notes.append(
            "the source calls its head tied, but it differs from the embedding: it is kept as the weights it is"
        )
        return "kept"
    if target == "apr":
        return "synthesized"
    del tensors[HEAD]
    notes.append("lm_head.weight was a copy of the embedding and is left out: the head is tied")
    return "dropped"


def _block_types(
    checkpoint: Checkpoint,
    target: FileFormat,
    tensors: Mapping[str, EncodedTensor],
    *,
    keep_blocks: bool,
    dtype: Dtype,
    notes: list[str],
) -> dict[str, str]:
    if target == "safetensors":
        chosen = {name: _float_type(tensor, dtype) for name, tensor in tensors.items()}
    elif target == "gguf":
        chosen = {name: _gguf_type(tensor) for name, tensor in tensors.items()}
    elif checkpoint.format == "gguf" and not keep_blocks:
        chosen = _imported_types(checkpoint, tensors, notes)
    else:
        chosen = {name: tensor.block_type if _fits_apr(tensor) else "F32" for name, tensor in tensors.items()}
    if target != "safetensors":
        chosen |= {name: "F32" for name, tensor in tensors.items() if len(tensor.shape) < 2}
    return chosen


def _imported_types(checkpoint: Checkpoint, tensors: Mapping[str, EncodedTensor], notes: list[str]) -> dict[str, str]:
    """What `apr import` makes of a GGUF file."""
    for tensor in tensors.values():
        if tensor.block_type not in IMPORT_KEPT + IMPORT_WIDENS_ALL:
            raise CheckpointError(
                f"`apr import` refuses {tensor.block_type}",
                file=checkpoint.path,
                tensor=tensor.name,
                offset=tensor.offset,
                fix="convert with --keep-blocks, which decodes only what APR cannot hold",
            )
    widening = sorted({tensor.block_type for tensor in tensors.values()} & set(IMPORT_WIDENS_ALL))
    if not widening:
        return {name: tensor.block_type for name, tensor in tensors.items()}
    notes.append(
        f"the whole model was decoded to float32, as `apr import` does when APR cannot hold a type "
        f"({', '.join(widening)}; GH-375); --keep-blocks keeps Q4_K and Q6_K. apr's own fallback also loses token "
        "types, padding id, add_bos and the chat template; they are kept here"
    )
    return dict.fromkeys(tensors, "F32")


def _fits_apr(tensor: EncodedTensor) -> bool:
    """Whether APR readers agree on what these bytes mean: rows of whole blocks, of a type that they all know."""
    return tensor.block_type in APR_HOLDS and _whole_rows(tensor)


def _gguf_type(tensor: EncodedTensor) -> str:
    known = block_format(tensor.block_type).ggml_id is not None
    return tensor.block_type if known and _whole_rows(tensor) else "F32"


def _whole_rows(tensor: EncodedTensor) -> bool:
    width = tensor.shape[-1] if tensor.shape else 1
    return not tensor.row_padded and width % block_format(tensor.block_type).block_size == 0


def _float_type(tensor: EncodedTensor, dtype: Dtype) -> str:
    if dtype != "auto":
        return dtype
    return tensor.block_type if tensor.block_type in FLOATS else "F32"
