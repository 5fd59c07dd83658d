"""Token ids of two continuations as text, cut where they part."""

from __future__ import annotations

from dataclasses import dataclass

from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding
from aprjax.text import Tokenizer
from aprjax.text.tokenizer import TextError


@dataclass(frozen=True)
class Words:
    """What turns ids into text; nothing does where no file has a vocabulary."""

    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, model: Checkpoint, ref: Checkpoint) -> Words:
        """The reference's tokenizer, or the model's where the reference has none."""
        for checkpoint in (ref, model):
            try:
                return cls(Tokenizer.from_checkpoint(checkpoint))
            except CheckpointError:
                continue
        return cls(None)

    def piece(self, token: int) -> str | None:
        """One token, readable."""
        if self.tokenizer is None:
            return None
        try:
            return self.tokenizer.token(token)
        except TextError:  # a row of the head beyond the vocabulary
            return f"<id {token}>"

    def bytes_of(self, tokens: tuple[int, ...]) -> bytes:
        """The bytes of all tokens; ids beyond the vocabulary are spelled out."""
        assert self.tokenizer is not None
        parts = []
        for token in tokens:
            try:
                parts.append(self.tokenizer.decode_bytes([token]))
            except TextError:
                parts.append(f"<id {token}>".encode())
        return b"".join(parts)

    def text(self, tokens: tuple[int, ...]) -> str | None:
        """The text of all tokens."""
        return None if self.tokenizer is None else self.bytes_of(tokens).decode("utf-8", "replace")

    def aligned(
        self, common: tuple[int, ...], rests: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[str | None, tuple[str | None, str | None]]:
        """The common text and both rests; a character that only the rests complete belongs to them."""
        if self.tokenizer is None:
            return None, (None, None)
        shared = self.bytes_of(common)
        cut = len(shared) - _unfinished(shared)
        texts = tuple((shared[cut:] + self.bytes_of(rest)).decode("utf-8", "replace") for rest in rests)
        return shared[:cut].decode("utf-8", "replace"), (texts[0], texts[1])


def _unfinished(text: bytes) -> int:
    """How many bytes at the end begin a character that needs more of them."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            needed = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
            return back if needed > back else 0
    return 0


def vocabulary_findings(model: Checkpoint, ref: Checkpoint, used: set[int]) -> tuple[Finding, ...]:
    """Whether the ids mean the same text on both sides; what is used weighs more than what is not."""
    if model.vocabulary is None or ref.vocabulary is None:
        return ()
    ours, theirs = model.vocabulary.tokens, ref.vocabulary.tokens
    if ours == theirs or not ours or not theirs:
        return ()
    count = min(len(ours), len(theirs))
    different = [index for index in range(count) if ours[index] != theirs[index]]
    met = sorted(index for index in different if index in used)
    if met:
        index = met[0]
        message = (
            f"token {index} is {ours[index]!r} in the model and {theirs[index]!r} in the reference, and is used here"
        )
        return (Finding("vocabularies-differ", "error", message),)
    sizes = f"the model's vocabulary has {len(ours)} tokens, the reference's {len(theirs)}"
    message = f"{sizes}; {len(different)} ids name other text, none of which is used here"
    return (Finding("vocabularies-differ", "info", message),)
