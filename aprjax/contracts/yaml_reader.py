"""YAML as contracts may use it, read strictly: plain data with the line of every key, and problems instead of errors.

Contracts come from other people, and YAML 1.1 is full of surprises. Refused, each with its line: duplicate keys (one
value would vanish), aliases and merge keys (a page of them expands to gigabytes), tags, several documents, text that
looks like a number (`1e-3`, which YAML 1.1 takes for text), and what is too large or too deep.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aprjax.contracts.problems import Problem

# Upstream's largest contract has 64 kB (contracts.md 1.3); four times that is still parsed within seconds.
MOST_BYTES = 1 << 18
# A contract nests five levels deep; the parser recurses, and Python ends at a thousand.
MOST_DEPTH = 32

# What people write as a number, and YAML 1.1 does not take for one (it wants a point and a signed exponent).
_LOOKS_LIKE_A_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")
_CORE_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")
}

Place = tuple[str | int, ...]


@dataclass
class Document:
    """A YAML file as plain data.

    Attributes:
        data: mappings as dicts, sequences as tuples; None where the file could not be read.
        lines: line (from 1) of every key and item, by its place.
        problems: what was refused.
    """

    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(path: Path) -> Document:
    """Reads a file; what is wrong with it is in `problems`, and nothing is raised.

    Raises:
        OSError: the file cannot be opened.
    """
    raw = path.read_bytes()
    document = Document()

    def refuse(line: int, rule: str, message: str) -> Document:
        document.problems.append(Problem(path, line, rule, message))
        return document

    if len(raw) > MOST_BYTES:
        return refuse(0, "CONTRACT-SIZE", f"{len(raw)} bytes, at most {MOST_BYTES} are read: split the contract")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return refuse(line, "CONTRACT-YAML", f"not UTF-8 at byte {error.start}: save it as UTF-8")
    try:
        found = _structure(text)
        if found is not None:
            return refuse(*found)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return refuse(0 if mark is None else mark.line + 1, "CONTRACT-YAML", f"no YAML: {error.problem}")
    except yaml.YAMLError as error:
        return refuse(0, "CONTRACT-YAML", f"no YAML: {' '.join(str(error).split())}")
    if not isinstance(root, yaml.MappingNode):
        return refuse(1, "CONTRACT-YAML", "expected a mapping with the key `metadata`, found " + _kind(root))
    document.data = _Reader(path, document).value(root, ())
    return document


def _structure(text: str) -> tuple[int, str, str] | None:
    """What the stream of events shows before anything is built: (line, rule, message) of the first thing refused."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return line, "CONTRACT-ALIAS", f"the alias *{event.anchor} is not accepted: write the value out"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                return line, "CONTRACT-YAML", "a second document begins here: one contract a file"
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                return line, "CONTRACT-DEPTH", f"nested deeper than {MOST_DEPTH} levels"
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _CORE_TAGS:
            return line, "CONTRACT-TAG", f"the tag {tag} is not accepted: contracts are plain data"
    return None


class _Reader:
    """Builds plain data from nodes, noting lines and problems."""

    def __init__(self, path: Path, document: Document) -> None:
        self._path, self._document = path, document
        self._constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, place: Place) -> Any:
        """The node's value; what is refused becomes a problem and None."""
        self._document.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*place, index)) for index, item in enumerate(node.value))
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                self._refuse(line, "CONTRACT-YAML", "expected a name as key, found " + (key or _kind(key_node)))
                continue
            if key in found:
                first = self._document.lines[(*place, key)]
                text = f"the key {key!r} is there twice (first in line {first}): one of its values would be lost"
                self._refuse(line, "SCHEMA-020", text)
                continue
            self._document.lines[(*place, key)] = line
            found[key] = self.value(value_node, (*place, key))
        return found

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        plain = getattr(node, "style", None) is None
        if node.tag == "tag:yaml.org,2002:str":
            if plain and _LOOKS_LIKE_A_NUMBER.fullmatch(node.value):
                mantissa, exponent = re.split("[eE]", node.value)
                better = (mantissa if "." in mantissa else f"{mantissa}.0") + "e"
                better += exponent if exponent[0] in "+-" else f"+{exponent}"
                text = (
                    f"{_where(place)}: {node.value} is text to YAML 1.1, not a number: write {better}, "
                    "or quote it if text is meant"
                )
                self._refuse(line, "CONTRACT-NUMBER", text)
                return None
            return node.value
        try:
            value = self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self._refuse(line, "CONTRACT-YAML", f"{_where(place)}: {node.value[:40]!r} cannot be read ({error})"[:300])
            return None
        if not isinstance(value, int | float | None):
            text = f"{_where(place)}: {node.value} is a date to YAML, not text: quote it"
            self._refuse(line, "CONTRACT-TYPE", text)
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(line, "CONTRACT-NUMBER", f"{_where(place)}: {node.value} is no finite number")
            return None
        return value

    def _refuse(self, line: int, rule: str, message: str) -> None:
        self._document.problems.append(Problem(self._path, line, rule, message))


def _where(place: Place) -> str:
    return ".".join(map(str, place)) or "the file"


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return {yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list"}.get(type(node), "a plain value")
