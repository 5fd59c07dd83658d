"""Token ids as readable text, by whichever side has a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.text.tokenizer import Tokenizer


class TokenTexts:
    """Readable tokens; of several checkpoints the first with a usable vocabulary speaks."""

    def __init__(self, *checkpoints: Checkpoint | None) -> None:
        self._tokenizer: Tokenizer | None = None
        for checkpoint in checkpoints:
            if checkpoint is None:
                continue
            try:
                self._tokenizer = Tokenizer.from_checkpoint(checkpoint)
                break
            except CheckpointError:
                continue  # `tokenize_both` has reported it, where it matters

    def __call__(self, token: int) -> str:
        """The token; its id where it has no text."""
        if self._tokenizer is None or not 0 <= token < len(self._tokenizer):
            return f"[{token}]"
        return self._tokenizer.token(token)

    def of(self, tokens: Iterable[int]) -> dict[int, str]:
        """The text of each id that has one, in the order of the ids."""
        if self._tokenizer is None:
            return {}
        known = len(self._tokenizer)
        return {token: self._tokenizer.token(token) for token in sorted(set(tokens)) if 0 <= token < known}
