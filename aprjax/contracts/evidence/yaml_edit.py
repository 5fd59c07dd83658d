"""Edits of a YAML text that touch nothing else: comments, quotes, order, spaces and line ends stay as they are.

A scalar is replaced at its place; a new key goes on a line of its own below a named neighbour. Every edit is proved
before it is handed back: the new text, read again, is the old document with exactly this change, and has every comment
that the old one had.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from typing import Any

Path = tuple[str | int, ...]


class EditError(ValueError):
    """A text that cannot be edited in place; says why."""


class YamlText:
    """A YAML document as text that can be edited.

    Args:
        text: a document without aliases.

    Raises:
        EditError: it is no mapping, or cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._end = "\r\n" if "\r\n" in text else "\n"
        self._root, self.data = _read(text)

    def replace(self, path: Path, value: str) -> None:
        """Replaces a scalar by a text; its quotes stay.

        Raises:
            EditError: there is no scalar at the path, or the text around it does not allow it.
        """
        node = self._node(path)
        if type(node).__name__ != "ScalarNode" or node.style in ("|", ">"):
            raise EditError(f"{_name(path)} is expected as a value on one line")
        quoted = {"'": f"'{value}'", '"': json.dumps(value)}.get(node.style or "", value)
        self._accept(_spliced(self.text, node.start_mark.index, node.end_mark.index, quoted), path, value)

    def insert_below(self, path: Path, key: str, value: Any) -> None:
        """Adds a key to the mapping at a path's parent, on a line below the key that the path names.

        Args:
            path: of a value on one line.
            key: the new key.
            value: a text, or a list of flat mappings of texts.

        Raises:
            EditError: the key is there already, or the mapping is not written in block style.
        """
        parent = self._node(path[:-1])
        if type(parent).__name__ != "MappingNode" or parent.flow_style:
            raise EditError(f"{_name(path[:-1])} is expected in block style: a key on each line")
        if any(name.value == key for name, _ in parent.value):
            raise EditError(f"{_name((*path[:-1], key))} is there already")
        name, _ = next(pair for pair in parent.value if pair[0].value == path[-1])
        lines = _block(key, value, " " * name.start_mark.column)
        self._insert_lines(self._last_line(self._node(path)), lines, (*path[:-1], key), value)

    def append(self, path: Path, item: dict[str, str]) -> None:
        """Adds a flat mapping to a list in block style.

        Raises:
            EditError: there is no such list.
        """
        node = self._node(path)
        if type(node).__name__ != "SequenceNode" or node.flow_style or not node.value:
            raise EditError(f"{_name(path)} is expected as a list in block style: an item on each line")
        # An item begins behind its dash; the dash stands where the text of its line begins.
        start = node.value[0].start_mark
        line = self.text[: start.index].rpartition("\n")[2]
        indent = " " * (len(line) - len(line.lstrip(" ")))
        dash = line.rfind("-")
        if dash < 0 or line[:dash].strip():
            # `- - x`, or a list whose first dash shares a line with something else.
            raise EditError(f"{_name(path)} is written in a way that cannot be added to")
        lines = _items([item], indent)
        self._insert_lines(self._last_line(node), lines, (*path, len(node.value)), item)

    def _insert_lines(self, after: int, lines: list[str], path: Path, value: Any) -> None:
        """Inserts lines after the line (from 0) with the number, and proves it."""
        # Not `splitlines`: it also splits where YAML does not.
        kept = re.split(r"(?<=\n)", self.text)
        if not kept[after].endswith("\n"):
            kept[after] += self._end
        kept[after + 1 : after + 1] = [line + self._end for line in lines]
        self._accept("".join(kept), path, value)

    def _accept(self, text: str, path: Path, value: Any) -> None:
        root, data = _read(text)
        expected = copy.deepcopy(self.data)
        _put(expected, path, value)
        if data != expected or type(_get(data, path)) is not type(value):
            raise EditError(f"{_name(path)} cannot be set to {value!r:.80} without changing something else")
        if Counter(_comments(text)) != Counter(_comments(self.text)):
            raise EditError(f"{_name(path)} cannot be set without losing a comment")
        self.text, self._root, self.data = text, root, data

    def _node(self, path: Path) -> Any:
        node = self._root
        for depth, step in enumerate(path):
            if isinstance(step, int) and type(node).__name__ == "SequenceNode" and step < len(node.value):
                node = node.value[step]
                continue
            pairs = node.value if type(node).__name__ == "MappingNode" else []
            found = next((value for name, value in pairs if name.value == step), None)
            if found is None:
                raise EditError(f"there is no {_name(path[: depth + 1])}")
            node = found
        return node

    def _last_line(self, node: Any) -> int:
        """The line (from 0) on which a node's last character stands; marks of blocks lie behind what follows them."""
        while type(node).__name__ != "ScalarNode" and node.value and not node.flow_style:
            last = node.value[-1]
            node = last[1] if isinstance(last, tuple) else last
        text = self.text[: node.end_mark.index]
        return text.rstrip().count("\n") if getattr(node, "style", None) in ("|", ">") else text.count("\n")


def _read(text: str) -> tuple[Any, Any]:
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise EditError("it has aliases, which an edit in one place would change in others")
        root, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EditError(f"it is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise EditError("a mapping is expected")
    return root, data


def _block(key: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, str):
        return [f"{indent}{key}: {_scalar(value)}"]
    return [f"{indent}{key}:", *_items(value, indent + "  ")]


def _items(items: list[dict[str, str]], indent: str) -> list[str]:
    lines = []
    for item in items:
        marks = ["- ", *["  "] * (len(item) - 1)]
        lines += [
            f"{indent}{mark}{key}: {_scalar(value)}" for mark, (key, value) in zip(marks, item.items(), strict=True)
        ]
    return lines


def _scalar(value: str) -> str:
    """A text as YAML: plain where nothing in it could be read as something else."""
    return value if re.fullmatch(r"[A-Za-z][A-Za-z_./-]*[A-Za-z]", value) and not _is_word(value) else json.dumps(value)


def _is_word(value: str) -> bool:
    return value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def _comments(text: str) -> list[str]:
    # A `#` within a quoted text counts as well: it must not be lost either.
    return [line[line.index("#") :].rstrip("\r") for line in text.split("\n") if "#" in line]


def _spliced(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def _put(data: Any, path: Path, value: Any) -> None:
    holder: Any = _get(data, path[:-1])
    if path[-1] == len(holder):
        holder.append(value)
    else:
        holder[path[-1]] = value


def _get(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _name(path: Path) -> str:
    return ".".join(map(str, path)) or "the document"
