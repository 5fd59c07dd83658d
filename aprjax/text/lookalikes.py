"""Characters of a prompt that nobody sees, or that look like others: they change the token ids and not the page.

Three kinds matter to a tokenizer: characters without a shape (zero-width spaces, direction marks, byte
order marks), spaces and controls that are not the usual ones, and look-alikes. A look-alike matters most
inside a special token: `<｜im_start｜>` with full-width bars is six or more ordinary tokens.

Characters that belong where they stand are left alone: joiners inside emoji and Indic or Arabic words,
selectors after emoji, the ideographic space among Chinese characters, words wholly in another script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["invisible", "space", "control", "look-alike", "special-look-alike"]

# Shapeless characters that are not of the category Cf: joiner, fillers, the empty Braille pattern.
_SHAPELESS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_JOINERS = frozenset("\u200c\u200d")
# ASCII's doubles in Unicode's confusables.txt (UTS 39), those that share its shape in common fonts and that
# compatibility normalisation (NFKC) does not bring to ASCII already.
_DOUBLES = dict(
    zip(
        "асԁеһіјӏорԛѕԝхуАВСЕНІЈКМОРЅТХΑΒΕΖΗΙΚΜΝΟΡΤΥΧονι",
        "acdehijlopqswxyABCEHIJKMOPSTXABEZHIKMNOPTYXovi",
        strict=True,
    )
) | dict(
    zip("ǀ∣│❘⏐‹〈⟨˂❮›〉⟩˃❯ˍ⎯", "|||||<<<<<>>>>>__", strict=True)
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Oddity:
    """One character, or one special token's double.

    Attributes:
        kind: what is odd about it.
        text: as it stands in the prompt.
        name: code point and Unicode name of the character (of the first that is odd).
        offset: byte at which it begins in the prompt's UTF-8.
        looks_like: what it is taken for; empty where that is nothing at all.
    """

    kind: Kind
    text: str
    name: str
    offset: int
    looks_like: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for people."""
        where = f"at byte {self.offset}"
        if self.kind == "special-look-alike":
            return f"{self.text!a} {where} looks like {self.looks_like} and is not: {self.name}"
        seen = {
            "invisible": "an invisible character",
            "space": "an unusual space",
            "control": "a control character",
            "look-alike": f"looks like {self.looks_like!r} in a word of Latin letters",
        }[self.kind]
        return f"{self.name} {where}: {seen}"


def oddities(text: str, special: Iterable[str] = ()) -> tuple[Oddity, ...]:
    """What is odd in a prompt, in order.

    Args:
        text: any text.
        special: texts of the tokenizer's special tokens, whose doubles are looked for.
    """
    places = _byte_offsets(text)
    found = [
        Oddity(kind, character, _name(character), places[at], looks_like)
        for at, character in enumerate(text)
        if not (character.isascii() and character.isprintable())
        for kind, looks_like in _judge(text, at)
    ]
    found += _doubles_in_words(text, places)
    found += _doubles_of_special(text, places, special)
    return tuple(sorted(found, key=lambda oddity: oddity.offset))


def _judge(text: str, at: int) -> list[tuple[Kind, str]]:
    character = text[at]
    category = unicodedata.category(character)
    if category == "Cc":
        return [] if character in "\t\n\r" else [("control", "")]
    if category in ("Zs", "Zl", "Zp"):
        usual = character == "\u3000" and any(_is_east_asian(c) for c in _neighbours(text, at))
        return [] if usual else [("space", " ")]
    if _is_selector(character):
        before = text[at - 1 : at]
        return [] if before and (unicodedata.category(before) in ("So", "Sm", "Po", "Nd")) else [("invisible", "")]
    if category == "Cf" or character in _SHAPELESS:
        joins = character in _JOINERS and all(not c.isascii() for c in _neighbours(text, at)) and at > 0
        return [] if joins or _is_emoji_tag(text, at) else [("invisible", "")]
    return []


def _neighbours(text: str, at: int) -> str:
    return text[max(0, at - 1) : at] + text[at + 1 : at + 2]


def _is_east_asian(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _is_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _is_emoji_tag(text: str, at: int) -> bool:
    """Tag characters after the black flag spell a region: the flag of Scotland."""
    if not "\U000e0020" <= text[at] <= "\U000e007f":
        return False
    before = text[:at].rstrip("".join(map(chr, range(0xE0020, 0xE0080))))
    return before.endswith("\U0001f3f4")


def _doubles_in_words(text: str, places: list[int]) -> list[Oddity]:
    found = []
    for word in _WORD.finditer(text):
        if word[0].isascii() or not any(character.isascii() for character in word[0]):
            continue
        for at, character in enumerate(word[0], word.start()):
            double = _ascii_double(character)
            # Latin-1 has letters of its own that normalisation folds: ª and º.
            if ord(character) > 0xFF and double.isalpha():
                found.append(Oddity("look-alike", character, _name(character), places[at], double))
    return found


def _doubles_of_special(text: str, places: list[int], special: Iterable[str]) -> list[Oddity]:
    if text.isascii():
        return []
    kept, plain = [], []
    for at, character in enumerate(text):
        if unicodedata.category(character) == "Cf" or character in _SHAPELESS or _is_selector(character):
            continue
        kept.append(at)
        plain.append(character if character.isascii() else _ascii_double(character) or character)
    flat = "".join(plain)
    found = []
    for token in sorted(set(special)):
        # Without brackets a token's text is a word like any other.
        if len(token) < 4 or not token.isascii() or token[0] not in "<[":
            continue
        for match in re.finditer(re.escape(token), flat):
            start, end = kept[match.start()], kept[match.end() - 1] + 1
            if text[start:end] != token:
                odd = next(character for character in text[start:end] if not character.isascii())
                found.append(Oddity("special-look-alike", text[start:end], _name(odd), places[start], token))
    return found


def _ascii_double(character: str) -> str:
    """The ASCII character that this one looks like; empty where there is none."""
    folded = unicodedata.normalize("NFKC", character)
    if len(folded) == 1 and folded.isascii():
        return folded
    return _DOUBLES.get(folded, _DOUBLES.get(character, ""))


def _name(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"U+{ord(character):04X}" + (f" {name}" if name else "")


def _byte_offsets(text: str) -> list[int]:
    offsets, total = [], 0
    for character in text:
        offsets.append(total)
        total += len(character.encode("utf-8", "surrogatepass"))
    return offsets
