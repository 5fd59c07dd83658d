"""`Tokenizer`: text to token ids and back, by a checkpoint's own vocabulary and merges.

Byte-level BPE as Qwen2 uses it: text is cut at special tokens, the rest is split into words by a
regular expression, each word's UTF-8 bytes are merged pairwise in the order of the merges. The ids are
those of llama.cpp, special cases included (`tests/text/` holds that); where Hugging Face's Qwen2
tokenizer differs, this module says so beside the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding, Vocabulary
from aprjax.text.byte_alphabet import CHARACTER_OF_BYTE, token_bytes
from aprjax.text.special_tokens import (
    CONTROL,
    END_OF_GENERATION,
    FILL_IN_MIDDLE_END,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Partition,
    declared_token_types,
    special_token_types,
)
from aprjax.text.words import QWEN2_WORDS

if TYPE_CHECKING:
    import tokenizers

# Names of pre-tokenizers that mean QWEN2_WORDS (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN2).
_QWEN2_NAMES = frozenset(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2"))
# What containers call byte-level BPE: GGUF "gpt2"; .apr "bpe" or "gpt2" (apr-format.md 6.5).
_BPE_NAMES = frozenset(("gpt2", "bpe"))

# Oniguruma gives up (as a Rust panic) after 10,000,000 steps back within one match, which a single run of
# white space of that length takes. The bound lies below it and far above any context window.
MAX_CHARACTERS = 8 << 20

_REIMPORT = "import the model again with a tool that embeds the tokenizer, or take the tokens from the other file"


class TextError(ValueError):
    """Text or token ids that cannot be encoded or decoded, whatever the checkpoint."""


class Tokenizer:
    """Byte-level BPE over one checkpoint's vocabulary; the ids are llama.cpp's.

    Attributes:
        vocabulary: tokens and merges as the checkpoint holds them.
        nfc: text is brought to Unicode's composed form first. Hugging Face's Qwen2 tokenizer does
            that, llama.cpp and realizar do not, so ids differ on decomposed text: `e` with a combining
            accent is one token with NFC, several without.
        special_ids: ids matched in text as a whole (control, user-defined and unknown tokens).
        eos_ids: ids that end an answer by the checkpoint's word: its EOS token and, in a ChatML
            vocabulary, `<|im_end|>` and `<|endoftext|>` (Qwen2.5's generation_config.json).
        stop_ids: every id at which llama.cpp ends generation (`llama_vocab_is_eog`).
        findings: what was assumed while building.
    """

    vocabulary: Vocabulary
    nfc: bool
    special_ids: frozenset[int]
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    findings: tuple[Finding, ...]

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        nfc: bool = False,
        file: str | Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Build from a vocabulary; `from_checkpoint` is the usual way.

        Args:
            vocabulary: tokens, merges and, where the container has them, token types.
            nfc: see the class.
            file: named in errors.
            metadata: GGUF metadata, whose end-of-turn and fill-in-the-middle ids count as stop ids.

        Raises:
            CheckpointError: no tokens, no merges, an unknown tokenizer or pre-tokenizer, duplicate
                tokens, merges that name unknown tokens, too few token types, ids out of range.
        """
        self.vocabulary = vocabulary
        self.nfc = nfc
        self._file = None if file is None else str(file)
        findings: list[Finding] = []
        self._check_kind(findings)
        self._index = self._index_tokens()
        self._model = self._build_model()
        self._types = self._classify(findings)
        self._partition = Partition.of(vocabulary.tokens, self._types)
        self._missing_bytes = frozenset(
            byte for byte, character in enumerate(CHARACTER_OF_BYTE) if character not in self._index
        )
        special = (CONTROL, USER_DEFINED, UNKNOWN)
        self.special_ids = frozenset(index for index, kind in self._types.items() if kind in special)
        self.eos_ids = self._ids_of(("<|im_end|>", "<|endoftext|>")) | self._declared_eos()
        declared = self._declared_stops(metadata or {})
        self.stop_ids = self._ids_of(END_OF_GENERATION | FILL_IN_MIDDLE_END) | self._declared_eos() | declared
        self.findings = tuple(findings)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, nfc: bool = False) -> Tokenizer:
        """The tokenizer that a checkpoint carries.

        Raises:
            CheckpointError: the checkpoint carries none, or one that cannot be used (see `__init__`).
        """
        vocabulary = checkpoint.vocabulary or Vocabulary(tokens=(), merges=())
        return cls(vocabulary, nfc=nfc, file=checkpoint.path, metadata=checkpoint.metadata)

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of a text, as `llama_tokenize` gives them.

        Args:
            text: any text without lone surrogates; the empty text has no tokens.
            parse_special: match control tokens (`<|im_start|>`) as a whole. Without it they are
                ordinary text. User-defined tokens (`<tool_call>`) are matched in either case.
            add_bos: put the BOS token first. No Qwen2 model was trained with one.

        Raises:
            TextError: a lone surrogate in the text, or more than `MAX_CHARACTERS`.
            CheckpointError: the vocabulary lacks a byte that the text needs, or the BOS token.
        """
        if len(text) > MAX_CHARACTERS:
            raise TextError(f"text has {len(text)} characters, at most {MAX_CHARACTERS} can be encoded")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                "it has no UTF-8 form, so no token ids. Likely fix: decode the input with errors='replace'"
            ) from None
        ids: list[int] = []
        if add_bos:
            ids.append(self._bos())
        for fragment in self._partition.split(text, parse_special=parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                self._refuse_missing_bytes(fragment)
                ids += self._model.encode(fragment, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD (see `decode_bytes`).

        Raises:
            TextError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The exact bytes of token ids. Unused (padding) entries of the vocabulary have none.

        Args:
            ids: token ids.
            skip_special: leave control tokens out; user-defined ones stay, as in llama.cpp.

        Raises:
            TextError: an id outside the vocabulary.
        """
        return b"".join(self._bytes(index, skip_special=skip_special) for index in ids)

    def token(self, token_id: int) -> str:
        r"""A readable piece for tables, on one line: a line feed is `\n`, part of a character `\xe4\xbd`.

        Raises:
            TextError: an id outside the vocabulary.
        """
        self._check_id(token_id)
        if self._types.get(token_id) is not None:
            return self.vocabulary.tokens[token_id]
        text = self._bytes(token_id, skip_special=False).decode("utf-8", "backslashreplace")
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

    def __len__(self) -> int:
        """Entries of the vocabulary, padding included."""
        return len(self.vocabulary.tokens)

    def _bytes(self, token_id: int, *, skip_special: bool) -> bytes:
        self._check_id(token_id)
        kind = self._types.get(token_id)
        text = self.vocabulary.tokens[token_id]
        if kind is None:
            return token_bytes(text)
        if kind in (CONTROL, UNKNOWN) and skip_special:
            return b""
        return b"" if kind == UNUSED else text.encode("utf-8")

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < len(self):
            raise TextError(f"token id {token_id} is outside the vocabulary (0 to {len(self) - 1})")

    def _check_kind(self, findings: list[Finding]) -> None:
        vocabulary = self.vocabulary
        for what in ("tokens", "merges"):
            if not getattr(vocabulary, what):
                key = "vocabulary" if what == "tokens" else what
                raise CheckpointError(
                    f"the file embeds no tokenizer {what} (tokenizer.{key}; upstream's PMAT-172), so text has no ids",
                    file=self._file,
                    fix=f"{_REIMPORT} (--tokens)",
                )
        if vocabulary.model is not None and vocabulary.model.lower() not in _BPE_NAMES:
            raise CheckpointError(
                f"tokenizer model {vocabulary.model!r}, expected byte-level BPE (gpt2)",
                file=self._file,
                fix="Qwen2 models use gpt2; if the file is a Qwen2, its tokenizer metadata is wrong",
            )
        if vocabulary.pre_tokenizer is None:
            message = "the file names no pre-tokenizer; qwen2 is assumed"
            findings.append(Finding("tokenizer-pre-missing", "info", message, reference="GH-277"))
        elif vocabulary.pre_tokenizer not in _QWEN2_NAMES:
            raise CheckpointError(
                f"pre-tokenizer {vocabulary.pre_tokenizer!r}, expected qwen2 (upstream's GH-277)",
                file=self._file,
                fix="set tokenizer.ggml.pre (.apr: tokenizer.pre_type) to qwen2 if the model is a Qwen2",
            )

    def _index_tokens(self) -> dict[str, int]:
        tokens = self.vocabulary.tokens
        index = {token: position for position, token in enumerate(tokens)}
        if len(index) != len(tokens):
            first: dict[str, int] = {}
            for position, token in enumerate(tokens):
                # Empty entries are padding that no text can reach; llama.cpp renames them.
                if first.setdefault(token, position) != position and token:
                    raise CheckpointError(
                        f"token {token!r} is in the vocabulary twice, as {first[token]} and {position} (GH-279)",
                        file=self._file,
                        fix="llama.cpp refuses such a file too; rename the padding entries",
                    )
        return index

    def _build_model(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        # Of a repeated merge llama.cpp keeps the first rank, `tokenizers` the last.
        unique = dict.fromkeys(self.vocabulary.merges)
        try:
            merges = [(merge[:space], merge[space + 1 :]) for merge in unique for space in (merge.index(" ", 1),)]
            model = models.BPE(vocab=self._index, merges=merges)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise self._bad_merge(error) from None
        tokenizer = Tokenizer(model)
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return tokenizer

    def _bad_merge(self, error: Exception) -> CheckpointError:
        fix = "the merges belong to another vocabulary, or were cut or reordered: import the model again"
        for position, merge in enumerate(self.vocabulary.merges):
            space = merge.find(" ", 1)
            if space < 0:
                return CheckpointError(
                    f"merge {position} is {merge!r}, expected 'left right'", file=self._file, fix=fix
                )
            left, right = merge[:space], merge[space + 1 :]
            for token in (left, right, left + right):
                if token not in self._index:
                    message = f"merge {position} ({merge!r}) names {token!r}, which is not in the vocabulary"
                    return CheckpointError(message, file=self._file, fix=fix)
        return CheckpointError(f"vocabulary and merges make no tokenizer: {error}", file=self._file, fix=fix)

    def _classify(self, findings: list[Finding]) -> dict[int, int]:
        vocabulary = self.vocabulary
        if vocabulary.token_types:
            if len(vocabulary.token_types) < len(vocabulary.tokens):
                raise CheckpointError(
                    f"{len(vocabulary.token_types)} token types for {len(vocabulary.tokens)} tokens",
                    file=self._file,
                    fix="the token_type array is cut; import the model again",
                )
            return declared_token_types(vocabulary.token_types, self._index)
        types = special_token_types(vocabulary.tokens)
        merged = {merge.replace(" ", "", 1) for merge in vocabulary.merges}
        ordinary = sorted(vocabulary.tokens[index] for index in types if vocabulary.tokens[index] in merged)
        message = f"the file has no token types: {len(types)} tokens are special by upstream's pattern"
        if ordinary:
            message += f", of which {', '.join(map(repr, ordinary[:5]))} would be ordinary text by the merges"
        findings.append(Finding("tokenizer-special-by-pattern", "info", message, reference="GH-189, GH-320"))
        return types

    def _ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        return frozenset(self._index[text] for text in texts if text in self._index)

    def _declared_eos(self) -> frozenset[int]:
        eos = self.vocabulary.eos_token_id
        if eos is None:
            return frozenset()
        self._check_declared("eos_token_id", eos)
        return frozenset((eos,))

    def _declared_stops(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        names = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        return frozenset(index for index in ids if isinstance(index, int) and 0 <= index < len(self))

    def _bos(self) -> int:
        bos = self.vocabulary.bos_token_id
        if bos is None:
            raise CheckpointError("the file names no BOS token", file=self._file, fix="encode without a BOS token")
        self._check_declared("bos_token_id", bos)
        return bos

    def _check_declared(self, name: str, token_id: int) -> None:
        if not 0 <= token_id < len(self):
            raise CheckpointError(
                f"tokenizer {name} is {token_id}, expected an id below {len(self)}",
                file=self._file,
                fix="correct the id in the metadata, or import the model again",
            )

    def _refuse_missing_bytes(self, fragment: str) -> None:
        if not self._missing_bytes:
            return
        if self.nfc and self._model.normalizer is not None:
            fragment = self._model.normalizer.normalize_str(fragment)
        missing = sorted(self._missing_bytes.intersection(fragment.encode("utf-8")))
        if missing:
            raise CheckpointError(
                f"the vocabulary has no token for the byte 0x{missing[0]:02X}, which the text needs",
                file=self._file,
                fix="a byte-level vocabulary has all 256 bytes; this one is cut or of another kind",
            )
