"""Faults of tokenizer and template: no weight changes, and `bisect tokens` must name the cause."""

from __future__ import annotations

from collections.abc import Callable

from container import AprFile, PlantError
from planted import Planted, Request

VOCABULARY, TYPES, EOS = "tokenizer.vocabulary", "tokenizer.token_type", "tokenizer.eos_token_id"
START, END = "<|im_start|>", "<|im_end|>"


def _place(file: AprFile, token: str) -> int:
    vocabulary = file.metadata.get(VOCABULARY) or []
    if token not in vocabulary:
        raise PlantError(f"the vocabulary has no token {token!r}; see --token")
    return vocabulary.index(token)


def swap_special_ids(file: AprFile, request: Request) -> Planted:
    """`<|im_start|>` and `<|im_end|>` have each other's ids."""
    first, second = _place(file, START), _place(file, END)
    vocabulary = file.metadata[VOCABULARY]
    vocabulary[first], vocabulary[second] = END, START
    file.set_key(VOCABULARY, vocabulary)
    return Planted(f"{START} and {END} exchanged", keys=(VOCABULARY,), cause="special-token-ids")


def wrong_eos(file: AprFile, request: Request) -> Planted:
    """The declared EOS token is `<|im_start|>` (or --token)."""
    index = _place(file, request.token or START)
    old = file.set_key(EOS, index)
    return Planted(f"EOS {old} -> {index}", keys=(EOS,), cause="special-token-ids")


def missing_eos(file: AprFile, request: Request) -> Planted:
    """No EOS token is declared."""
    old = file.set_key(EOS, None)
    return Planted(f"EOS {old} -> null", keys=(EOS,), cause="stop-tokens")


def ordinary_special(file: AprFile, request: Request) -> Planted:
    """`<|im_start|>` (or --token) is typed as an ordinary token, so that text of it falls to pieces."""
    index, types = _place(file, request.token or START), file.metadata.get(TYPES)
    if not types:
        raise PlantError(f"the file has no {TYPES}, whose types could be wrong")
    old, types[index] = types[index], 1
    file.set_key(TYPES, types)
    return Planted(f"type of token {index} {old} -> 1", keys=(TYPES,), cause="special-tokens-as-text")


def broken_template(file: AprFile, request: Request) -> Planted:
    """The chat template refuses every conversation."""
    keys = tuple(key for key in ("chat_template", "tokenizer.chat_template") if file.metadata.get(key))
    if not keys:
        raise PlantError("the file has no chat template")
    for key in keys:
        file.set_key(key, "{{ raise_exception('planted') }}")
    return Planted("the chat template raises", keys=keys, cause="template")


def missing_tokenizer(file: AprFile, request: Request) -> Planted:
    """Vocabulary and merges are empty."""
    keys = (VOCABULARY, "tokenizer.merges")
    for key in keys:
        file.set_key(key, [])
    return Planted("vocabulary and merges emptied", keys=keys, cause="tokenizer-missing")


TEXT_FAULTS: dict[str, Callable[[AprFile, Request], Planted]] = {
    "special-ids-swapped": swap_special_ids,
    "eos-id-wrong": wrong_eos,
    "eos-missing": missing_eos,
    "special-token-ordinary": ordinary_special,
    "template-broken": broken_template,
    "tokenizer-missing": missing_tokenizer,
}
