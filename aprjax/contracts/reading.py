"""Evidence files, read as what they are: text that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The largest evidence that we write is the raw report of `layers` over three probes of a 28-layer model, about 3 MB; a
# repository's host refuses files over 100 MB. More than this is not read, so that no examination runs out of memory.
MOST_BYTES = 1 << 26
# Nested deeper than this is no evidence; Python's own parser would run out of stack somewhere above.
_DEEPEST = 100


class Unreadable(ValueError):
    """A file of a folder that cannot be read as what it is to be; says why."""


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        Unreadable: it is no plain file, too large, or cannot be read.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise Unreadable("expected a plain file, found a link, a folder or nothing")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Unreadable(f"{size} bytes; evidence files have at most {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        Unreadable: see `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"expected UTF-8, found {error.object[error.start : error.start + 1]!r}") from error


def read_document(path: Path) -> Any:
    """The value in a JSON file: strict JSON, no key twice, no NaN.

    Raises:
        Unreadable: it is something else.
    """
    return parse_document(read_text(path))


def parse_document(text: str) -> Any:
    """The value in a JSON text; see `read_document`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise Unreadable(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} is given twice")
        return found

    def refuse(constant: str) -> Any:
        raise Unreadable(f"{constant} has no place in JSON: what was not measured is null")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except Unreadable:
        raise
    except json.JSONDecodeError as error:
        raise Unreadable(f"expected JSON: {error.msg} at line {error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the JSON cannot be read: {type(error).__name__}") from error
    if _depth(value) > _DEEPEST:
        raise Unreadable(f"nested deeper than {_DEEPEST} levels")
    return value


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level and deepest <= _DEEPEST:
        deepest += 1
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return deepest


def expect(document: Any, key: str, *kinds: type) -> Any:
    """The value of a key that must be there and of one of these types (a bool is no number).

    Raises:
        Unreadable: it is not.
    """
    if not isinstance(document, dict):
        raise Unreadable(f"expected an object with {key!r}, found {type(document).__name__}")
    if key not in document:
        raise Unreadable(f"{key!r} is missing")
    value = document[key]
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if wrong_bool or not isinstance(value, kinds):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise Unreadable(f"{key!r} is expected as {wanted}, found {type(value).__name__}")
    return value
