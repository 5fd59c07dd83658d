r"""`tokenizer.json`, `tokenizer_config.json` and friends <-> `Vocabulary`.

Token types follow llama.cpp's converter: added tokens that are special are control tokens, other
added tokens are user-defined, ids that no token has are unused and called `[PAD<id>]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aprjax.checkpoint.json_file import read_json
from aprjax.checkpoint.mapped_file import map_file
from aprjax.checkpoint.types import CheckpointError, Finding, Vocabulary

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# How Qwen2's own tokenizer.json cuts text into words.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Token ids above this are damage: no vocabulary in use is a quarter as large, and gaps are filled.
_MAX_TOKENS = 1 << 20
_FIX = "the file is damaged: download it again"


def read_vocabulary(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> tuple[Vocabulary | None, list[Finding]]:
    """The vocabulary of a folder: from `tokenizer.json`, or from `vocab.json` with `merges.txt`.

    Args:
        folder: the model's folder.
        config: its `config.json` (special ids that the tokenizer's own files leave out).
        tokenizer_config: its `tokenizer_config.json`, or an empty mapping.

    Raises:
        CheckpointError: a file is there but damaged.
    """
    findings: list[Finding] = []
    pre_tokenizer: str | None = "qwen2"
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise CheckpointError("expected a byte-pair-encoding model", file=path, fix="give a Qwen2 tokenizer")
        vocab, merges, added = model.get("vocab"), model.get("merges", []), content.get("added_tokens") or []
        if _words(content.get("pre_tokenizer")) != QWEN2_WORDS:
            message = "tokenizer.json cuts text into words in another way than Qwen2's"
            findings.append(Finding("pre-tokenizer-unknown", "warning", message, reference="GH-277"))
            pre_tokenizer = None
    elif (folder / "vocab.json").is_file():
        path = folder / "vocab.json"
        vocab, merges = read_json(path), _read_merges(folder / "merges.txt")
        decoder = tokenizer_config.get("added_tokens_decoder")
        entries = decoder.items() if isinstance(decoder, dict) else ()
        added = [
            {**token, "id": int(number)}
            for number, token in entries
            if number.isdecimal() and len(number) < 10 and isinstance(token, dict)
        ]
    else:
        return None, findings
    tokens, types = _tokens(path, vocab, added)
    index = {token: number for number, token in enumerate(tokens)}

    def special(kind: str, key: str) -> int | None:
        stated = tokenizer_config.get(f"{kind}_token")
        text = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(text, str) and text in index:
            return index[text]
        number = config.get(key)
        number = number[0] if isinstance(number, list) and number else number
        return number if type(number) is int else None

    add_bos = tokenizer_config.get("add_bos_token")
    vocabulary = Vocabulary(
        tokens=tokens,
        merges=_merges(path, merges),
        token_types=types,
        bos_token_id=special("bos", "bos_token_id"),
        eos_token_id=special("eos", "eos_token_id"),
        padding_token_id=special("pad", "pad_token_id"),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        pre_tokenizer=pre_tokenizer,
        model="gpt2",
    )
    return vocabulary, findings


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, or `chat_template` of `tokenizer_config.json` (of several, the one named default)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return map_file(path).tobytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError("the template is not UTF-8", file=path, offset=error.start, fix=_FIX) from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def tokenizer_files(vocabulary: Vocabulary, chat_template: str | None) -> dict[str, dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json` for a Qwen2 vocabulary.

    Raises:
        CheckpointError: the vocabulary cuts text in a way that is not known here.
    """
    if vocabulary.pre_tokenizer not in ("qwen2", None):
        raise CheckpointError(
            f"pre-tokenizer {vocabulary.pre_tokenizer!r} is not known; only qwen2's can be written",
            fix="correct tokenizer.ggml.pre in the source file",
        )
    types = vocabulary.token_types or (NORMAL,) * len(vocabulary.tokens)
    entries = list(zip(vocabulary.tokens, types, strict=True)) if len(types) == len(vocabulary.tokens) else []
    if not entries:
        raise CheckpointError(
            f"{len(types)} token types for {len(vocabulary.tokens)} tokens", fix="convert the source again"
        )
    used = 1 + max((number for number, (_, kind) in enumerate(entries) if kind != UNUSED), default=-1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind == CONTROL,
            }
            for number, (token, kind) in enumerate(entries)
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            # Added tokens too: `tokenizers` ignores the ids of those that the vocabulary lacks, and counts on.
            "vocab": {token: number for number, (token, _) in enumerate(entries[:used])},
            "merges": list(vocabulary.merges),
        },
    }  # fmt: skip

    def text(token_id: int | None) -> str | None:
        if token_id is None or not 0 <= token_id < len(vocabulary.tokens):
            return None
        return vocabulary.tokens[token_id]

    settings = {
        # Takes tokenizer.json as it is; Qwen2's own class would put its word pattern in the place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(vocabulary.bos_token_id),
        "eos_token": text(vocabulary.eos_token_id),
        "pad_token": text(vocabulary.padding_token_id),
        "clean_up_tokenization_spaces": False,
    }
    if vocabulary.add_bos is not None:
        settings["add_bos_token"] = vocabulary.add_bos
    if chat_template is not None:
        settings["chat_template"] = chat_template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _words(pre_tokenizer: Any) -> str | None:
    """The regular expression of the one `Split` step there should be."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else None
    if not isinstance(steps, list):
        return None
    patterns = [step.get("pattern") for step in steps if isinstance(step, dict) and step.get("type") == "Split"]
    if len(patterns) != 1 or not isinstance(patterns[0], dict):
        return None
    return patterns[0].get("Regex")


def _tokens(path: Path, vocab: Any, added: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    by_id: dict[int, tuple[str, int]] = {}
    entries: list[tuple[Any, Any, int]] = []
    if isinstance(vocab, dict):
        entries += [(number, token, NORMAL) for token, number in vocab.items()]
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            entries.append((token.get("id"), token.get("content"), CONTROL if token.get("special") else USER_DEFINED))
    for number, token, kind in entries:
        if type(number) is not int or not 0 <= number < _MAX_TOKENS or not isinstance(token, str):
            raise CheckpointError(f"token {str(token)[:40]!r} has the id {str(number)[:40]!r}", file=path, fix=_FIX)
        if by_id.get(number, (token,))[0] != token:
            raise CheckpointError(
                f"tokens {by_id[number][0]!r} and {token!r} share the id {number}", file=path, fix=_FIX
            )
        by_id[number] = (token, kind)
    if not by_id:
        raise CheckpointError("expected a vocabulary, found none", file=path, fix=_FIX)
    filled = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(max(by_id) + 1)]
    tokens = tuple(token for token, _ in filled)
    # What a writer called so to fill a gap is as unused as the gap was.
    kinds = (UNUSED if token == f"[PAD{number}]" else kind for number, (token, kind) in enumerate(filled))
    return tokens, tuple(kinds)


def _merges(path: Path, merges: Any) -> tuple[str, ...]:
    """Merges as `"left right"`; newer tokenizer.json files write pairs instead."""
    if not isinstance(merges, list):
        raise CheckpointError(f"expected merges as a list, found {type(merges).__name__}", file=path, fix=_FIX)
    joined = []
    for number, merge in enumerate(merges):
        if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
            merge = " ".join(merge)  # noqa: PLW2901 - a pair and a joined text are the same merge
        if not isinstance(merge, str):
            raise CheckpointError(f"merge {number} is {str(merge)[:40]!r}", file=path, fix=_FIX)
        joined.append(merge)
    return tuple(joined)


def _read_merges(path: Path) -> list[str]:
    try:
        lines = map_file(path).tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError("the merges are not UTF-8", file=path, offset=error.start, fix=_FIX) from error
    return [line for line in lines if line and not line.startswith("#version")]
