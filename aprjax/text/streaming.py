"""Text from tokens as they come, in whole characters."""

from __future__ import annotations

import codecs

from aprjax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns tokens into text one by one; what all calls return is together what `Tokenizer.decode` gives.

    A token may end in the middle of a character: its bytes wait for the tokens that complete it. Bytes that no
    character can begin or go on with become U+FFFD at once, those still waiting at the end when `finish` is called.

    Attributes:
        without_text: ids outside the vocabulary that were fed: rows of the embedding that no token stands for.
    """

    without_text: list[int]

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        """For one text; `skip_special` leaves control tokens out."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.without_text = []

    def feed(self, token: int) -> str:
        """The text that is certain with this token; often all of it, sometimes none."""
        if not 0 <= token < len(self._tokenizer):
            self.without_text.append(token)
            return ""
        return self._decoder.decode(self._tokenizer.decode_bytes([token], skip_special=self._skip_special))

    def finish(self) -> str:
        """What was still waiting, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
