"""`_PROVENANCE.txt`, which upstream's oracle script leaves beside the stages it writes (contracts.md section 2.4).

A title behind `# `, then a line per entry: the key, a colon, spaces up to column 23, the value as Python writes it.
Texts are quoted, lists have brackets; the older of upstream's scripts writes names of stages without quotes. What is
written from such a text is that text again, byte for byte.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAME = "_PROVENANCE.txt"
_COLUMN = 23
# A provenance is a page of text: more is some other file.
_MOST = 1 << 16
_ENTRY = re.compile(r"([A-Za-z_][\w ()-]*):([ ]*)(.*)")


@dataclass(frozen=True)
class Provenance:
    """What a folder of stages says of itself.

    Attributes:
        title: of the first line, without `# `; empty where there is none.
        entries: values as they stand in the text, by key.
        rest: what follows the entries, word for word.
    """

    title: str = ""
    entries: Mapping[str, str] = field(default_factory=dict)
    rest: str = ""

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """What was fed; None where it is not said."""
        return self._numbers("tokens")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers that were captured; None where it is not said."""
        return self._numbers("layers_captured")

    @property
    def prompt(self) -> str | None:
        """The prompt; None where it is not said."""
        value = _literal(self.entries.get("prompt"))
        return value if isinstance(value, str) else None

    @property
    def by_heads(self) -> bool:
        """Whether post-rope queries, keys, scores and probabilities lie head by head, as the oracle's do.

        `apr trace` writes post-rope values position by position, and leaves no such file.
        """
        return self.entries.get("with_attn_substages") == "True"

    def text(self) -> str:
        """The file's text."""
        head = f"# {self.title}\n" if self.title else ""
        lines = (f"{key}:".ljust(_COLUMN) + value for key, value in self.entries.items())
        return head + "".join(f"{line}\n" for line in lines) + self.rest

    def _numbers(self, key: str) -> tuple[int, ...] | None:
        value = _literal(self.entries.get(key))
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            return None
        return tuple(value)


def parse_provenance(text: str) -> Provenance:
    """The provenance in a text; a text of another form has no entries, and comes back as its `rest`."""
    lines = re.split(r"(?<=\n)", text)
    title = lines[0][2:-1] if lines[0].startswith("# ") and lines[0].endswith("\n") else ""
    entries: dict[str, str] = {}
    at = int(bool(title))
    for line in lines[at:]:
        found = _ENTRY.fullmatch(line.removesuffix("\n"))
        if found is None or not line.endswith("\n") or found[1] in entries:
            break
        if f"{found[1]}:".ljust(_COLUMN) + found[3] != line.removesuffix("\n"):
            break
        entries[found[1]] = found[3]
        at += 1
    return Provenance(title, entries, "".join(lines[at:]))


def read_provenance(folder: Path) -> str:
    """The text beside the stages; empty where there is none."""
    try:
        with (folder / NAME).open("rb") as stream:
            return stream.read(_MOST).decode("utf-8", "replace")
    except OSError:
        return ""


def one_line(value: object) -> str:
    """A value as an entry has it."""
    return " ".join(str(value).split())


def _literal(text: str | None) -> object:
    if text is None:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
