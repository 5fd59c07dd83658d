"""Characters that nobody sees or that look like others are found, and those that belong there are left alone."""

from __future__ import annotations

import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from aprjax.text import wrap
from aprjax.text.lookalikes import oddities
from aprjax.text.wrapping import nested_turns, unwrap, user_text

from .corpus import corpus

SPECIAL = ("<|im_start|>", "<|im_end|>", "<tool_call>", "[UNK]")
ODD = [
    ("zero\u200bwidth", [("invisible", 4, "U+200B ZERO WIDTH SPACE", "")]),
    ("\ufeffhello", [("invisible", 0, "U+FEFF ZERO WIDTH NO-BREAK SPACE", "")]),
    ("é\u202eabc", [("invisible", 2, "U+202E RIGHT-TO-LEFT OVERRIDE", "")]),
    ("a\u00adb", [("invisible", 1, "U+00AD SOFT HYPHEN", "")]),
    ("a\u200db", [("invisible", 1, "U+200D ZERO WIDTH JOINER", "")]),
    ("a\ufe0f", [("invisible", 1, "U+FE0F VARIATION SELECTOR-16", "")]),
    ("a\u3164b", [("invisible", 1, "U+3164 HANGUL FILLER", "")]),
    ("a\u00a0b", [("space", 1, "U+00A0 NO-BREAK SPACE", " ")]),
    ("a\u3000b", [("space", 1, "U+3000 IDEOGRAPHIC SPACE", " ")]),
    ("a\u2028b", [("space", 1, "U+2028 LINE SEPARATOR", " ")]),
    ("\x07", [("control", 0, "U+0007", "")]),
    ("\x00", [("control", 0, "U+0000", "")]),
    ("p\u0430ypal", [("look-alike", 1, "U+0430 CYRILLIC SMALL LETTER A", "a")]),
    ("\uff21BC", [("look-alike", 0, "U+FF21 FULLWIDTH LATIN CAPITAL LETTER A", "A")]),
    ("<\uff5cim_start\uff5c>", [("special-look-alike", 0, "U+FF5C FULLWIDTH VERTICAL LINE", "<|im_start|>")]),
    ("hi <\u01c0im_end|>", [("special-look-alike", 3, "U+01C0 LATIN LETTER DENTAL CLICK", "<|im_end|>")]),
    (
        "<|im_st\u200bart|>",
        [
            ("special-look-alike", 0, "U+200B ZERO WIDTH SPACE", "<|im_start|>"),
            ("invisible", 7, "U+200B ZERO WIDTH SPACE", ""),
        ],
    ),
]
USUAL = [
    "def f(x):\n\treturn x\r\n",
    "<|im_start|>user\n[UNK] <tool_call>",
    "Größe, naïve, nº 5, x², Café",
    "привет, мир",
    "你好\u3000世界",
    "日本語ー",
    "👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "क्\u200dष می\u200cخواهم",
    "αβγ + x = ω",
    "",
]


@pytest.mark.parametrize(("text", "expected"), ODD)
def test_what_is_odd_is_found_at_its_byte(text, expected):
    found = oddities(text, SPECIAL)
    assert [(o.kind, o.offset, o.name, o.looks_like) for o in found] == expected
    for oddity in found:
        assert text.encode()[oddity.offset :].startswith(oddity.text.encode())
        assert f"at byte {oddity.offset}" in oddity.sentence()
        assert oddity.to_json()["name"] == oddity.name


@pytest.mark.parametrize("text", USUAL)
def test_what_belongs_there_is_left_alone(text):
    assert oddities(text, SPECIAL) == ()


def test_the_corpus_has_oddities_only_where_it_is_about_them():
    plain = [text for kind, text in corpus() if kind in ("code", "latin", "plain", "cjk")]
    assert plain
    found = {oddity.kind for text in plain for oddity in oddities(text, SPECIAL)}
    assert not found & {"look-alike", "special-look-alike"}


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_searched(text):
    for oddity in oddities(text, SPECIAL):
        assert not all(c.isascii() and c.isprintable() for c in oddity.text)
        assert oddity.name.startswith("U+")
    visible = [c for c in text if unicodedata.category(c) != "Cf"]
    if text.isascii() and all(c.isprintable() or c in "\t\r\n" for c in visible):
        assert oddities(text, SPECIAL) == ()


@given(st.text(max_size=20).filter(lambda text: "<|im_" not in text))
@settings(max_examples=60, deadline=None)
def test_a_wrap_nests_once_more_each_time_and_comes_off_again(text):
    once, twice = wrap(text, "once"), wrap(text, "twice")
    assert (nested_turns(text), nested_turns(once)) == ((), ())
    assert nested_turns(twice) == (len("<|im_start|>user\n"),)
    assert (unwrap(once), unwrap(twice)) == (text, once)
    assert user_text(twice) == user_text(once) == text
    assert unwrap(text) is None


def test_turns_that_are_no_wrap():
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    conversation = system + wrap("hi", "once")
    assert nested_turns(conversation) == ()
    assert (unwrap(conversation), user_text(conversation)) == (None, conversation)
    # A wrapped conversation: its first turn opens inside the user's.
    assert nested_turns(wrap(conversation, "once")) == (17,)
    assert nested_turns("é<|im_start|><|im_start|>") == (14,)
    assert unwrap("<|im_start|>user\n") is None
