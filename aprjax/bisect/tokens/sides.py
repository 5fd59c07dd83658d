"""The two sides of `bisect tokens`: what makes each one's ids, and what its file says of its tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from aprjax.bisect.open_sides import Opened
from aprjax.bisect.tokens.report import FedSide, Kind, Token, TokenizerInfo
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.text import TextError, Tokenizer
from aprjax.text.special_tokens import UNUSED, USER_DEFINED

# Entries that only fill the embedding's rows: llama.cpp's converter writes the first, upstream's export the
# second (apr-format.md 6.5).
_PADDING = re.compile(r"\[PAD\d+\]|<\|pad_\d+\|>")


@dataclass(frozen=True)
class TokenSide:
    """One side: its tokenizer, or why there is none.

    Attributes:
        name: `model` or `ref`.
        opened: the side as it was named.
        problem: why there is no tokenizer; None where there is one.
    """

    name: str
    opened: Opened
    tokenizer: Tokenizer | None
    problem: CheckpointError | None = None

    @classmethod
    def of(cls, name: str, opened: Opened) -> TokenSide:
        """The side, with the tokenizer of its file."""
        checkpoint = opened.checkpoint
        if checkpoint is None:
            missing = CheckpointError("the file that the trace was made from is not at hand", file=opened.side.path)
            return cls(name, opened, None, missing)
        try:
            # transformers brings text to its composed form first; llama.cpp and realizar do not.
            return cls(name, opened, Tokenizer.from_checkpoint(checkpoint, nfc=opened.side.kind == "hf"))
        except CheckpointError as error:
            return cls(name, opened, None, error)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The file of the side, where it is at hand."""
        return self.opened.checkpoint

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """The ids of a recorded trace."""
        return self.opened.tokens

    @cached_property
    def padding(self) -> frozenset[int]:
        """Ids that stand for no token."""
        return frozenset() if self.tokenizer is None else padding_ids(self.tokenizer)

    @property
    def declared_eos(self) -> int | None:
        """The EOS id that the file itself names: readers of `.apr` assume Qwen2's where there is none."""
        if self.tokenizer is None or self.checkpoint is None:
            return None
        assumed = any(finding.id == "apr-eos-absent" for finding in self.checkpoint.findings)
        return None if assumed else self.tokenizer.vocabulary.eos_token_id

    def info(self) -> TokenizerInfo | None:
        """What the file says of its tokenizer; None without one."""
        if self.tokenizer is None or self.checkpoint is None:
            return None
        vocabulary = self.tokenizer.vocabulary
        return TokenizerInfo(
            path=str(self.checkpoint.path),
            format=self.checkpoint.format,
            tokens=len(vocabulary.tokens),
            padding=len(self.padding),
            merges=len(vocabulary.merges),
            bos=vocabulary.bos_token_id,
            eos=self.declared_eos,
            pad=vocabulary.padding_token_id,
            add_bos=vocabulary.add_bos,
            pre_tokenizer=vocabulary.pre_tokenizer,
            stop_ids=tuple(sorted(self.tokenizer.stop_ids)),
            template=bool(self.checkpoint.chat_template),
        )

    def encode(self, text: str) -> FedSide:
        """What the side's own tokenizer makes of a text, without BOS.

        Raises:
            CheckpointError: the vocabulary lacks a byte that the text needs, or the text has no UTF-8 form.
        """
        if self.tokenizer is None:
            return FedSide("none")
        try:
            return self.fed("tokenizer", self.tokenizer.encode(text))
        except TextError as error:
            raise CheckpointError(str(error), file=self.opened.side.path) from None

    def fed(self, source: str, ids: list[int] | tuple[int, ...], reader: TokenSide | None = None) -> FedSide:
        """Ids with their texts, by this side's vocabulary or, where it has none, by the reader's."""
        by = self if self.tokenizer is not None else reader
        if by is None or by.tokenizer is None:
            return FedSide(source, tuple(Token(index, "", Kind.NORMAL, 0, 0) for index in ids))
        tokenizer, tokens, data = by.tokenizer, [], b""
        for index in ids:
            kind = kind_of(tokenizer, index, by.padding)
            piece = b"" if kind is Kind.OUTSIDE else tokenizer.decode_bytes([index])
            text = "" if kind is Kind.OUTSIDE else tokenizer.token(index)
            tokens.append(Token(index, text, kind, len(data), len(data) + len(piece)))
            data += piece
        return FedSide(source, tuple(tokens), data.decode("utf-8", "replace"))


def kind_of(tokenizer: Tokenizer, index: int, padding: frozenset[int]) -> Kind:
    """What an id stands for."""
    if not 0 <= index < len(tokenizer):
        return Kind.OUTSIDE
    if index in padding:
        return Kind.PADDING
    if index not in tokenizer.special_ids:
        return Kind.NORMAL
    types = tokenizer.vocabulary.token_types
    declared = types[index] if index < len(types) else None
    text = tokenizer.vocabulary.tokens[index]
    user_defined = declared == USER_DEFINED if declared is not None else not text.startswith("<|")
    return Kind.USER_DEFINED if user_defined else Kind.CONTROL


def padding_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Entries of a vocabulary that only fill rows of the embedding."""
    vocabulary = tokenizer.vocabulary
    unused = {index for index, kind in enumerate(vocabulary.token_types) if kind == UNUSED}
    named = {
        i for i, text in enumerate(vocabulary.tokens) if not text or (text[0] in "[<" and _PADDING.fullmatch(text))
    }
    return frozenset(unused | named)
