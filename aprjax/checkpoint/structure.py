"""Whether the tensors of a checkpoint are those, and of the shapes, that its config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from aprjax.checkpoint.types import EncodedTensor, Finding, ModelConfig, Vocabulary, canonical_tensor_shapes


def structure_findings(config: ModelConfig, tensors: Mapping[str, EncodedTensor]) -> list[Finding]:
    """Findings `missing-tensor`, `shape-mismatch` (errors) and `unexpected-tensor` (info).

    An absent `lm_head.weight` is no finding: the head is then tied to the embedding.
    """
    findings = []
    expected = canonical_tensor_shapes(config)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if name != "lm_head.weight":
                message = f"{name} {list(shape)} is not in the file; the model cannot run without it"
                reference = "F-REGR-231, GH-87" if name.endswith(".bias") else "GH-279, PMAT-234"
                findings.append(Finding("missing-tensor", "error", message, tensor=name, reference=reference))
        elif tensor.shape != shape:
            message = f"expected shape {list(shape)} by the config, found {list(tensor.shape)}"
            findings.append(Finding("shape-mismatch", "error", message, tensor=name, offset=tensor.offset))
    for name in tensors:
        if name not in expected:
            findings.append(Finding("unexpected-tensor", "info", f"{name} is no tensor of a Qwen2", tensor=name))
    return findings


def overlap_findings(tensors: Iterable[EncodedTensor]) -> list[Finding]:
    """Finding `tensor-overlap` (error) for tensors of one file that share bytes."""
    findings = []
    by_place = sorted((tensor for tensor in tensors if tensor.nbytes), key=lambda tensor: (tensor.file, tensor.offset))
    for before, after in pairwise(by_place):
        if before.file == after.file and before.offset + before.nbytes > after.offset:
            message = f"begins at {after.offset}, inside {before.name}, which ends at {before.offset + before.nbytes}"
            findings.append(Finding("tensor-overlap", "error", message, tensor=after.name, offset=after.offset))
    return findings


def vocabulary_findings(config: ModelConfig, vocabulary: Vocabulary | None) -> list[Finding]:
    """Findings about ids and counts of the vocabulary that do not go with the config or each other."""
    if vocabulary is None:
        message = "the file holds no vocabulary; text cannot be tokenized with it"
        return [Finding("vocabulary-missing", "warning", message, reference="GH-185, PMAT-172")]
    findings = []
    count = len(vocabulary.tokens)
    if count > config.vocab_size:
        message = f"{count} tokens, but the embedding has only {config.vocab_size} rows"
        findings.append(Finding("vocabulary-too-long", "error", message))
    elif count < config.vocab_size:
        # Hugging Face pads the embedding beyond the tokenizer, so this alone is no fault.
        message = f"{count} tokens for {config.vocab_size} embedding rows; the rest have no text"
        findings.append(Finding("vocabulary-padded", "info", message))
    if vocabulary.token_types and len(vocabulary.token_types) != count:
        message = f"{len(vocabulary.token_types)} token types for {count} tokens"
        findings.append(Finding("token-types-length", "error", message))
    if not vocabulary.merges:
        findings.append(Finding("merges-missing", "warning", "no merges: text cannot be tokenized as in training"))
    for kind in ("bos", "eos", "padding"):
        token_id = getattr(vocabulary, f"{kind}_token_id")
        if token_id is not None and not 0 <= token_id < count:
            message = f"{kind} token id {token_id} is not one of {count} tokens"
            findings.append(Finding("token-id-out-of-range", "warning", message))
    return findings
