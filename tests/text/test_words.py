"""The pre-tokenizer's character classes are llama.cpp's, on every code point."""

from __future__ import annotations

import ctypes

import pytest
from tokenizers import Regex, pre_tokenizers

from aprjax.text import words

NUMBER, LETTER, WHITESPACE = 0x0002, 0x0004, 0x0100  # unicode_cpt_flags, llama.cpp's unicode.h

CHARACTERS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def members(character_class: str) -> set[str]:
    split = pre_tokenizers.Split(Regex(f"{character_class}+"), "removed", invert=True)
    return {character for piece, _ in split.pre_tokenize_str("".join(CHARACTERS)) for character in piece}


def pieces(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(words.QWEN2_WORDS), "isolated").pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def flags(llama_library) -> dict[str, int]:
    # A C++ function, by its mangled name; the struct of sixteen flags comes back in a register.
    try:
        function = llama_library.llama["_Z26unicode_cpt_flags_from_cptj"]
    except AttributeError:
        pytest.skip("this build of llama.cpp does not export unicode_cpt_flags_from_cpt")
    function.restype, function.argtypes = ctypes.c_uint16, [ctypes.c_uint32]
    return {character: function(ord(character)) for character in CHARACTERS}


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("character_class", "belongs"),
    [
        (words.LETTER, lambda flag, _: bool(flag & LETTER)),
        (words.NUMBER, lambda flag, _: bool(flag & NUMBER)),
        (r"\s", lambda flag, _: bool(flag & WHITESPACE)),
        (words.SYMBOL, lambda flag, _: not flag & (LETTER | NUMBER | WHITESPACE)),
        (words.BEFORE_LETTERS, lambda flag, c: not flag & (LETTER | NUMBER) and c not in "\r\n"),
    ],
    ids=["letter", "number", "white space", "symbol", "before letters"],
)
def test_classes_are_those_of_llama_cpp(flags, character_class, belongs):
    expected = {character for character, flag in flags.items() if belongs(flag, character)}
    differing = sorted(members(character_class) ^ expected)
    # Non-empty after an update of either package: their versions of Unicode have moved apart.
    assert not differing, [f"U+{ord(character):04X}" for character in differing[:20]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 2+22?", ["What", " is", " ", "2", "+", "2", "2", "?"]),
        ("I'm, don'T 'RE", ["I", "'m", ",", " don", "'T", " '", "RE"]),
        # Long s folds to s, but llama.cpp lowers letters without folding.
        ("a'ſt", ["a", "'ſt"]),
        ("  x\n\n  y \t\r\nz  ", [" ", " x", "\n\n", " ", " y", " \t\r\n", "z", "  "]),
        ("a  !?\r\n\nb", ["a", " ", " !?\r\n\n", "b"]),
        ("\u3000\u3000中文。", ["\u3000", "\u3000中文", "。"]),
        # A combining mark is no letter: it ends a word, and may begin the next.
        ("ne\u0301e", ["ne", "\u0301e"]),
        # A letter of Unicode 16.0 counts as a symbol, as in llama.cpp.
        ("a\u1c89b", ["a", "\u1c89b"]),
    ],
)
def test_words(text, expected):
    assert pieces(text) == expected
