"""The `qwen2` pre-tokenizer: the regular expression that splits text into words before the merges.

Written for the Oniguruma engine inside `tokenizers`, so that it splits as llama.cpp's hand-written
`unicode_regex_split_custom_qwen2` does on every code point (`tests/text/test_words.py` looks at all).
"""

from __future__ import annotations

# Letters and digits that Unicode 16.0 added. Oniguruma knows them; llama.cpp's tables (unicode-data.cpp,
# as of llama-cpp-python 0.3.36) are those of 15.1, where these code points are unassigned and therefore
# count as symbols. Hugging Face's tokenizer takes them for letters and digits: there, ids differ.
ADDED_LETTERS = (
    (0x1C89, 0x1C8A),
    (0xA7CB, 0xA7CD),
    (0xA7DA, 0xA7DC),
    (0x105C0, 0x105F3),
    (0x10D4A, 0x10D65),
    (0x10D6F, 0x10D85),
    (0x10EC2, 0x10EC4),
    (0x11380, 0x113B7),
    (0x113D1, 0x113D3),
    (0x11BC0, 0x11BE0),
    (0x13460, 0x143FA),
    (0x16100, 0x1611D),
    (0x16D40, 0x16D6C),
    (0x18CFF, 0x18CFF),
    (0x1E5D0, 0x1E5F0),
)
ADDED_DIGITS = (
    (0x10D40, 0x10D49),
    (0x116D0, 0x116E3),
    (0x11BF0, 0x11BF9),
    (0x16130, 0x16139),
    (0x16D70, 0x16D79),
    (0x1CCF0, 0x1CCF9),
    (0x1E5F1, 0x1E5FA),
)


def _ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_ADDED = _ranges(ADDED_LETTERS + ADDED_DIGITS)
LETTER = rf"[\p{{L}}&&[^{_ADDED}]]"
NUMBER = rf"[\p{{N}}&&[^{_ADDED}]]"
BEFORE_LETTERS = rf"[[^\r\n\p{{L}}\p{{N}}]{_ADDED}]"
SYMBOL = rf"[[^\s\p{{L}}\p{{N}}]{_ADDED}]"

# In order of preference: a contraction; letters with at most one other character before them; a single
# digit; symbols with a space before and line ends after; white space up to its last line end; white
# space, leaving one character to the word that follows; white space at the end.
# The case of contractions is spelled out because `(?i:'s)`, as Hugging Face has it, also matches
# 'ſ (U+017F folds to s), which llama.cpp does not.
QWEN2_WORDS = "|".join(
    (
        "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])",
        f"{BEFORE_LETTERS}?{LETTER}+",
        NUMBER,
        rf" ?{SYMBOL}+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
