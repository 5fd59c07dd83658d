"""Is a generated text degenerate? The upstream gate's rules, so that our verdict is theirs on any string.

contracts.md section 5, read against aprender's `output_verification.rs` (`verify_output`,
`strip_thinking_blocks`) and its golden gate (`strip_prefix(prompt)`). The gate first takes away the
prompt's echo, then thinking blocks and the white space around; then, in this order, it refuses:

1. `empty`: nothing but white space;
2. `marker`: U+FFFD, `[UNK]`, `akunji` or `olumbia`, the first of these that occurs;
3. `non-ascii`: from 16 characters on, more than 60 % of them non-ASCII;
4. `fragment`: from 12 bytes on, three copies in a row of the same 4 to min(16, bytes / 3) bytes;
5. `replacement`: from 32 characters on, more than one U+FFFD in 32;
6. `nul`: a NUL byte;
7. `expected`: none of the expected substrings occurs, whatever the case.

Rule 5 can never decide in the gate, since rule 2 comes first; it is there for who asks `gibberish` alone.
Characters are Unicode scalar values and fragments are bytes of UTF-8, as in Rust.

The gate has false positives, which are reproduced and named (`TextVerdict.false_positive_risk`):
rulers and deep indentation trip rule 4, and any answer in Chinese or Russian trips rule 3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from aprjax.text.tokenizer import TextError

Rule = Literal["empty", "marker", "non-ascii", "fragment", "replacement", "nul", "expected"]

MARKERS = ("\ufffd", "[UNK]", "akunji", "olumbia")
# All of these are upstream's numbers (contracts.md section 5).
NON_ASCII_FROM_CHARACTERS = 16
NON_ASCII_SHARE = 0.6
FRAGMENT_FROM_BYTES = 12
SHORTEST_FRAGMENT, LONGEST_FRAGMENT = 4, 16
REPLACEMENT_FROM_CHARACTERS = 32
CHARACTERS_PER_REPLACEMENT = 32

# Unicode's White_Space, which Rust trims. Python's `strip()` also takes U+001C to U+001F, which it leaves.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_THINK, _THOUGHT = "<think>", "</think>"

# Bytes that lay text out and say nothing: indentation, blank lines, rulers, frames of tables, leaders.
# "!" is not among them: a run of it is what a broken model emits whose every logit is NaN (token 0 of Qwen2).
_LAYOUT = frozenset(b" \t\r\n=-_*#~+|.:/\\<>^`")
# Scripts by the first word of their characters' Unicode names; those written together count as one.
_EAST_ASIAN = frozenset(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC"))


@dataclass(frozen=True)
class TextVerdict:
    """What the upstream gate says of one text.

    Attributes:
        passed: whether the gate lets it pass.
        rule: the rule that refused it (see the module); None when it passed.
        detail: the same in words.
        offset: where in the UTF-8 bytes of `judged` the marker, fragment or NUL begins; None for other rules.
        fragment: the marker, or the repeated bytes as text (cut characters become U+FFFD).
        judged: the text that the rules were applied to.
        false_positive_risk: why the refusal may be wrong; None where nothing speaks for that.
    """

    passed: bool
    rule: Rule | None
    detail: str
    offset: int | None = None
    fragment: str | None = None
    judged: str = ""
    false_positive_risk: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


def judge_text(text: str | bytes, *, expected: Sequence[str] = (), prompt: str | None = None) -> TextVerdict:
    """The golden gate's verdict on a completion: echo and thinking stripped, then `verify_output`.

    Args:
        text: what the model wrote; bytes are decoded as upstream does, invalid UTF-8 becoming U+FFFD.
        expected: substrings of which one must occur; none expected, none missed.
        prompt: taken away where the text begins with exactly it (upstream's engines return the prompt, too).

    Raises:
        TextError: a lone surrogate: such a text has no UTF-8 form, and upstream could never be given it.
    """
    return verify_output(strip_thinking(strip_echo(_text(text), prompt)), expected)


def verify_output(text: str | bytes, expected: Sequence[str] = ()) -> TextVerdict:
    """Upstream's `verify_output`: the rules alone, without stripping anything.

    Raises:
        TextError: see `judge_text`.
    """
    text = _text(text)
    if not text.strip(WHITE_SPACE):
        return TextVerdict(False, "empty", "nothing but white space", judged=text)
    for marker in MARKERS:
        at = text.find(marker)
        if at >= 0:
            offset = len(text[:at].encode())
            shown = "U+FFFD" if marker == "\ufffd" else repr(marker)
            return TextVerdict(False, "marker", f"{shown} at byte {offset}", offset, marker, text)
    refused = gibberish(text)
    if refused is not None:
        return refused
    nulls = text.count("\0")
    if nulls:
        offset = len(text[: text.index("\0")].encode())
        return TextVerdict(False, "nul", f"{nulls} NUL bytes, the first at byte {offset}", offset, "\0", text)
    lower = text.lower()
    if expected and not any(pattern.lower() in lower for pattern in expected):
        return TextVerdict(False, "expected", f"none of {', '.join(map(repr, expected))} occurs", judged=text)
    return TextVerdict(True, None, "no rule of the gate is broken", judged=text)


def gibberish(text: str | bytes) -> TextVerdict | None:
    """Upstream's `detect_gibberish`: rules 3 to 5 alone; None where none is broken.

    Raises:
        TextError: see `judge_text`.
    """
    text = _text(text)
    return _non_ascii(text) or _fragment(text) or _replacements(text)


def strip_echo(text: str, prompt: str | None) -> str:
    """The text without the prompt that it begins with, taken away once and only if it is there exactly."""
    return text if prompt is None else text.removeprefix(prompt)


def strip_thinking(text: str) -> str:
    """The text without `<think>…</think>` blocks and without white space around it.

    A `<think>` that stays open cuts off what follows; so does one that comes after a stray `</think>`.
    """
    while True:
        start, end = text.find(_THINK), text.find(_THOUGHT)
        if start < 0 or end <= start:
            break
        text = text[:start] + text[end + len(_THOUGHT) :]
    return (text if start < 0 else text[:start]).strip(WHITE_SPACE)


def _text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which has no "
            "UTF-8 form. Likely fix: decode the output with errors='replace'"
        ) from None
    return text


def _non_ascii(text: str) -> TextVerdict | None:
    total = len(text)
    foreign = [character for character in text if not character.isascii()]
    if total < NON_ASCII_FROM_CHARACTERS or not len(foreign) / total > NON_ASCII_SHARE:
        return None
    detail = f"{len(foreign)} of {total} characters are not ASCII, more than 60 %"
    scripts = {_script(character) for character in foreign if character.isalpha()}
    risk = None
    if len(scripts) == 1 and scripts != {"LATIN"}:
        risk = f"the letters are all of one script ({scripts.pop().lower()}): text in another language trips this rule"
    return TextVerdict(False, "non-ascii", detail, judged=text, false_positive_risk=risk)


def _script(character: str) -> str:
    word = unicodedata.name(character, "?").split()[0].partition("-")[0]
    return "EAST ASIAN" if word in _EAST_ASIAN else word


def _fragment(text: str) -> TextVerdict | None:
    data = text.encode("utf-8")
    if len(data) < FRAGMENT_FROM_BYTES:
        return None
    for length in range(SHORTEST_FRAGMENT, min(LONGEST_FRAGMENT, len(data) // 3) + 1):
        found = _thrice(length).search(data)
        if found is None:
            continue
        fragment, offset = found[1], found.start()
        shown = fragment.decode("utf-8", "replace")
        risk = None
        if _LAYOUT.issuperset(fragment):
            what = "white space" if not fragment.strip() else "a ruler or the frame of a table"
            risk = f"the fragment is {what}: well-formed code and tables trip this rule"
        detail = f"{length} bytes {shown!r} three times in a row from byte {offset}"
        return TextVerdict(False, "fragment", detail, offset, shown, text, risk)
    return None


@lru_cache
def _thrice(length: int) -> re.Pattern[bytes]:
    # The leftmost match of a pattern of fixed length is upstream's first offset.
    return re.compile(rb"(.{%d})\1\1" % length, re.DOTALL)


def _replacements(text: str) -> TextVerdict | None:
    total, count = len(text), text.count("\ufffd")
    if total < REPLACEMENT_FROM_CHARACTERS or count * CHARACTERS_PER_REPLACEMENT <= total:
        return None
    detail = f"{count} of {total} characters are U+FFFD, more than one in {CHARACTERS_PER_REPLACEMENT}"
    return TextVerdict(False, "replacement", detail, len(text[: text.index("\ufffd")].encode()), "\ufffd", text)
