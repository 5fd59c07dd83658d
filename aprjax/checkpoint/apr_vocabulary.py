"""Vocabulary and chat template from APR metadata (apr-format.md 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aprjax.checkpoint.apr_findings import FindingLog
from aprjax.checkpoint.types import Vocabulary

# realizar's default for qwen2 and qwen3 (apr-format.md 2.3).
QWEN2_EOS = 151645
CHATML_START = "<|im_start|>"
_NO_TOKENIZER = "GH-185, GH-156, #2392, #2437, PMAT-154, PMAT-172"


def read_vocabulary(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> Vocabulary | None:
    """The vocabulary in the `tokenizer.*` keys, `None` where there is none.

    Args:
        metadata: of the file.
        offset: of the metadata section, for messages.
        log: where findings go.
    """
    tokens = _strings(metadata, "tokenizer.vocabulary", offset, log)
    if not tokens:
        log.add(
            "apr-vocabulary-absent",
            "error",
            "tokenizer.vocabulary is absent. realizar needs it and looks at no file beside the .apr; `apr run` cannot "
            "encode a prompt",
            offset=offset,
            reference=_NO_TOKENIZER,
        )
        return None
    merges = _strings(metadata, "tokenizer.merges", offset, log)
    if not merges:
        log.add(
            "apr-merges-absent",
            "error",
            "tokenizer.merges is absent: realizar cannot encode text as the model was trained on",
            offset=offset,
            reference=_NO_TOKENIZER,
        )
    shapeless = next((merge for merge in merges if " " not in merge), None)
    if shapeless is not None:
        log.add(
            "apr-merge-without-space",
            "error",
            f"the merge {shapeless[:40]!r} holds no space; readers split each merge at its first one",
            offset=offset,
        )
    if CHATML_START not in tokens and metadata.get("architecture") == "qwen2":
        log.add(
            "apr-chatml-tokens-absent",
            "warning",
            f"no token {CHATML_START!r} in the vocabulary: realizar splits it into pieces, and so does every ChatML "
            "prompt",
            offset=offset,
            reference="GH-189, GH-320",
        )
    if not isinstance(metadata.get("tokenizer.pre_type"), str):
        log.add(
            "apr-pre-tokenizer-absent",
            "info",
            "tokenizer.pre_type is absent; `apr export` to GGUF then names no pre-tokenizer",
            offset=offset,
            reference="GH-277, #277",
        )
    eos = _integer(metadata, "tokenizer.eos_token_id", offset, log)
    if eos is None and len(tokens) > QWEN2_EOS:
        log.add(
            "apr-eos-absent",
            "info",
            f"tokenizer.eos_token_id is absent; {QWEN2_EOS} is realizar's default for Qwen2",
            offset=offset,
        )
        eos = QWEN2_EOS
    add_bos = metadata.get("tokenizer.add_bos_token")
    return Vocabulary(
        tokens=tuple(tokens),
        merges=tuple(merges),
        token_types=_token_types(metadata, offset, log),
        bos_token_id=_integer(metadata, "tokenizer.bos_token_id", offset, log),
        eos_token_id=eos,
        padding_token_id=_integer(metadata, "tokenizer.padding_token_id", offset, log),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        pre_tokenizer=_string(metadata, "tokenizer.pre_type"),
        # Importers of GGUF write `model`, those of safetensors `model_type` (apr-format.md 8, item 11).
        model=_string(metadata, "tokenizer.model") or _string(metadata, "tokenizer.model_type"),
    )


def read_chat_template(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> str | None:
    """The chat template, from its own key or the tokenizer's; the former wins where they differ."""
    top, tokenizers = _string(metadata, "chat_template"), _string(metadata, "tokenizer.chat_template")
    if top is not None and tokenizers is not None and top != tokenizers:
        log.add(
            "apr-chat-templates-differ",
            "warning",
            "chat_template and tokenizer.chat_template differ; aprjax takes the former. realizar renders neither, but "
            "a built-in template chosen by architecture",
            offset=offset,
            reference="#3672, #3743, #3848, #1658, #638",
        )
    template = top if top is not None else tokenizers
    if template is None:
        log.add(
            "apr-chat-template-absent",
            "info",
            "no chat template; realizar wraps prompts of a qwen2 file all the same, by its built-in one",
            offset=offset,
            reference="#3672, #1658",
        )
    return template


def _strings(metadata: Mapping[str, Any], key: str, offset: int, log: FindingLog) -> list[str]:
    value = metadata.get(key)
    if value is None:
        return []
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return value
        pairs = [" ".join(item) for item in value if _is_pair(item)]
        if key == "tokenizer.merges" and len(pairs) == len(value):
            log.add(
                "apr-merges-as-pairs",
                "warning",
                "merges are pairs, expected texts 'left right'; realizar reads none of them",
                offset=offset,
            )
            return pairs
    log.add("apr-tokenizer-type", "error", f"{key} must be a list of texts; it is ignored", offset=offset)
    return []


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)


def _token_types(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> tuple[int, ...]:
    value = metadata.get("tokenizer.token_type")
    if value is None:
        return ()
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    log.add(
        "apr-tokenizer-type", "error", "tokenizer.token_type must be a list of integers; it is ignored", offset=offset
    )
    return ()


def _integer(metadata: Mapping[str, Any], key: str, offset: int, log: FindingLog) -> int | None:
    value = metadata.get(key)
    if value is None or type(value) is int:
        return value
    log.add(
        "apr-tokenizer-type",
        "error",
        f"{key} must be an integer, found {str(value)[:40]!r}; it is ignored",
        offset=offset,
    )
    return None


def _string(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None
