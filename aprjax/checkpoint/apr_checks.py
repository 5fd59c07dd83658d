"""What is missing from, or odd about, the tensors of an APR model as a Qwen2 (apr-format.md 4.3 and 6.7)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aprjax.checkpoint.apr_findings import FindingLog, listing
from aprjax.checkpoint.apr_tensors import looks_zero
from aprjax.checkpoint.types import EncodedTensor, ModelConfig, canonical_tensor_shapes

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
_NORM = re.compile(r"(?:.*\.)?(?:input_layernorm|post_attention_layernorm|norm|[qk]_norm)\.weight")


def check_model(
    config: ModelConfig, tensors: Mapping[str, EncodedTensor], metadata: Mapping[str, Any], log: FindingLog
) -> None:
    """Note what deviates from a complete Qwen2 that all real readers load alike.

    Args:
        config: of the model.
        tensors: by canonical name.
        metadata: of the file.
        log: where findings go.
    """
    expected = canonical_tensor_shapes(config)
    _check_complete(config, expected, tensors, log)
    _check_biases(config, tensors, log)
    for name, tensor in tensors.items():
        wanted = expected.get(name)
        if wanted is not None and tensor.shape != wanted:
            log.add(
                "shape-mismatch",
                "error",
                f"expected shape {list(wanted)} by the config, found {list(tensor.shape)}",
                tensor=name,
                offset=tensor.offset,
            )
    _check_vector_types(tensors, log)
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        log.add(
            "unexpected-tensor",
            "info",
            f"{len(unexpected)} tensors are none of a Qwen2's: {listing(unexpected)}; they are not computed with",
            tensor=unexpected[0],
        )
    _check_head(tensors, metadata, log)
    if metadata.get("format") == "entrenar-checkpoint":
        log.add(
            "apr-entrenar-transposed",
            "error",
            "a checkpoint of the entrenar trainer: the matrices' bytes are those of [in, out], though their shapes "
            "say [out, in]. Only AprTransformer transposes them; aprjax, like all other readers, computes with the "
            "bytes as they lie",
            reference="ALB-106, ALB-107, ALB-109",
        )


def _check_complete(
    config: ModelConfig, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, EncodedTensor], log: FindingLog
) -> None:
    missing = [name for name in expected if name not in tensors and name != HEAD and not name.endswith(".bias")]
    layers_found = {match[1] for name in tensors if (match := _LAYER.match(name))}
    absent_layers = [str(layer) for layer in range(config.num_layers) if str(layer) not in layers_found]
    consequence = (
        "`apr import` refuses such a model; realizar's from_apr refuses it, AprTransformer computes with zeros"
    )
    if absent_layers:
        log.add(
            "missing-tensor",
            "error",
            f"{len(absent_layers)} of {config.num_layers} layers have no tensors at all, the first is layer "
            f"{absent_layers[0]}; {consequence}",
            tensor=f"model.layers.{absent_layers[0]}",
            reference="GH-279, PMAT-234, #194",
        )
    for name in missing:
        match = _LAYER.match(name)
        if match is None or match[1] in layers_found:
            log.add(
                "missing-tensor",
                "error",
                f"the tensor is not in the file; {consequence}",
                tensor=name,
                reference="GH-279, PMAT-234",
            )


def _check_biases(config: ModelConfig, tensors: Mapping[str, EncodedTensor], log: FindingLog) -> None:
    names = [
        [f"model.layers.{layer}.self_attn.{projection}_proj.bias" for projection in "qkv"]
        for layer in range(config.num_layers)
    ]
    flat = [name for layer in names for name in layer]
    absent = [name for name in flat if name not in tensors]
    if not absent:
        return
    if len(absent) == len(flat):
        log.add(
            "missing-bias",
            "error",
            f"none of the {len(flat)} q, k and v biases is in the file. Qwen2 has them all: realizar computes without",
            tensor=absent[0],
            reference="F-REGR-231, GH-87, GH-279",
        )
        return
    for layer in names:
        gone = [name for name in layer if name not in tensors]
        if gone:
            dropped = " and drops the others of the layer as well" if len(gone) < len(layer) else ""
            log.add(
                "missing-bias",
                "error",
                f"the file has biases, but not {listing(gone)}: realizar's from_apr computes without{dropped}",
                tensor=gone[0],
                reference="F-REGR-231, GH-87",
            )


def _check_vector_types(tensors: Mapping[str, EncodedTensor], log: FindingLog) -> None:
    norms = [name for name, tensor in tensors.items() if _NORM.fullmatch(name) and tensor.block_type != "F32"]
    if norms:
        kinds = sorted({tensors[name].block_type for name in norms})
        log.add(
            "apr-norm-not-f32",
            "error",
            f"{len(norms)} norm weights are {' and '.join(kinds)} ({listing(norms)}). realizar takes norm bytes as F32 "
            "whatever the dtype says, and computes with nonsense",
            tensor=norms[0],
            reference="GH-189, apr-format.md 4.3",
        )
    biases = [
        name for name, tensor in tensors.items() if name.endswith(".bias") and tensor.block_type not in ("F32", "F16")
    ]
    if biases:
        kinds = sorted({tensors[name].block_type for name in biases})
        log.add(
            "apr-bias-not-float",
            "error",
            f"{len(biases)} biases are {' and '.join(kinds)} ({listing(biases)}). realizar reads F32 and F16 biases "
            "and takes the bytes of any other type as F32",
            tensor=biases[0],
            reference="apr-format.md 4.3",
        )


def _check_head(tensors: Mapping[str, EncodedTensor], metadata: Mapping[str, Any], log: FindingLog) -> None:
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        log.add(
            "apr-head-absent",
            "warning",
            "lm_head.weight is absent: aprjax and AprTransformer take the embedding for it; realizar's from_apr "
            "refuses the file",
            tensor=HEAD,
            reference="GH-88, PMAT-918, #199",
        )
        return
    if looks_zero(head.data):
        log.add(
            "apr-head-zero",
            "error",
            "lm_head.weight is all zeros: every logit is 0. `apr import` replaces such a head by the embedding",
            tensor=HEAD,
            offset=head.offset,
            reference="GH-88",
        )
    elif metadata.get("tied_embeddings") is True and embedding is not None and not _same_start(head, embedding):
        log.add(
            "apr-head-not-tied",
            "error",
            "tied_embeddings is true, but lm_head.weight is not a copy of the embedding. Readers use the head as it "
            "is; `apr export` drops it and so changes the model",
            tensor=HEAD,
            offset=head.offset,
            reference="GH-88, #231",
        )


def _same_start(head: EncodedTensor, embedding: EncodedTensor) -> bool:
    """Whether type, shape, and the first and last mebibyte agree: what a lazy opening can afford to compare."""
    window = 1 << 20
    return (
        head.block_type == embedding.block_type
        and head.shape == embedding.shape
        and bool((head.data[:window] == embedding.data[:window]).all())
        and bool((head.data[-window:] == embedding.data[-window:]).all())
    )
