"""Text that comes in parts is the text that comes at once, and never half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aprjax.text import Tokenizer
from aprjax.text.byte_alphabet import CHARACTER_OF_BYTE
from aprjax.text.streaming import Detokenizer
from text.synthetic import small_vocabulary

TOKENIZER = Tokenizer(small_vocabulary())
BYTE_TOKENS = [TOKENIZER.vocabulary.tokens.index(character) for character in CHARACTER_OF_BYTE]


def streamed(ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, **options)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30), st.booleans())
def test_any_tokens_stream_to_what_decode_gives(ids: list[int], skip: bool) -> None:
    assert "".join(streamed(ids, skip_special=skip)) == TOKENIZER.decode(ids, skip_special=skip)


@given(st.text(max_size=20))
def test_whole_characters_come_when_they_are_complete(text: str) -> None:
    data = text.encode("utf-8", "replace")
    pieces = streamed([BYTE_TOKENS[byte] for byte in data])
    assert "".join(pieces) == data.decode()
    assert pieces[-1] == ""
    assert all(len(piece) <= 1 for piece in pieces)


def test_what_is_never_completed_comes_at_the_end() -> None:
    # The first three bytes of a face, then nothing.
    assert streamed([BYTE_TOKENS[byte] for byte in b"a\xf0\x9f\x98"]) == ["a", "", "", "", "\ufffd"]
    # A letter instead of the rest: what waited was no character.
    assert streamed([BYTE_TOKENS[byte] for byte in b"\xf0\x9fb"]) == ["", "", "\ufffdb", ""]


def test_ids_without_a_token_are_kept_apart() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.feed(len(TOKENIZER)) == ""
    assert detokenizer.feed(-1) == ""
    assert detokenizer.without_text == [len(TOKENIZER), -1]
