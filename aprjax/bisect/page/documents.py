"""The reports that a page is made of: JSON as the commands wrote it, read again and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprjax.checkpoint.types import CheckpointError

# The version of each command's JSON that this page reads, in the order of a drift that is followed:
# the page's sections stand in it. What a version adds is left alone where it is not known.
VERSIONS = {
    "check": 1,
    "files": 1,
    "tokens": 1,
    "layers": 1,
    "locate": 1,
    "attribute": 1,
    "explain": 1,
    "margins": 1,
    "generate": 1,
    "chatml": 1,
    "replay": 1,
    "noise": 1,
}
# A report of the longest prompt has some megabytes; more than this is no report.
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Document:
    """One report.

    Attributes:
        command: which command wrote it.
        value: its JSON.
        source: the name of the file it was read from, or will lie in.
    """

    command: str
    value: dict[str, Any]
    source: str = ""

    @property
    def parts(self) -> list[dict[str, Any]]:
        """A report for each prompt."""
        return self.value.get("probes") or [self.value]

    @property
    def verdict(self) -> str:
        """Of the whole; a command that only measures has none, and says so."""
        if self.command == "attribute":
            return "unmeasured" if self.value.get("verdict") == "unmeasured" else "measured"
        if self.command == "check":
            return "fail" if self.value["failed"] else ("unmeasured" if self.value["exit_code"] else "pass")
        return str(self.value.get("verdict", "measured"))


def as_document(value: Any, source: str = "") -> Document:
    """A report's JSON, its schema and version checked.

    Raises:
        CheckpointError: it is no report, or one of a version that this page does not read.
    """
    if not isinstance(value, dict):
        raise _refused(f"expected a report's JSON object, found {_kind(value)}", source)
    schema = value.get("schema")
    found = re.fullmatch(r"aprjax\.([a-z]+)/([0-9]{1,6})", schema) if isinstance(schema, str) else None
    if found is None:
        named = "no schema" if schema is None else f"schema {json.dumps(schema)[:80]}"
        raise _refused(f"expected a report with a schema such as aprjax.layers/1, found {named}", source)
    command, version = found[1], int(found[2])
    if command not in VERSIONS:
        raise _refused(f"{schema} is no report that a page can be made of: {', '.join(VERSIONS)} are", source)
    if version != VERSIONS[command]:
        raise CheckpointError(
            f"expected aprjax.{command}/{VERSIONS[command]}, found {schema}",
            file=source or None,
            fix="run the command again, or render with the aprjax that wrote it",
        )
    return Document(command, value, source)


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """The reports of some files; of a folder, those in it.

    Raises:
        CheckpointError: a file cannot be read or is no report, or a folder holds none.
    """
    documents = []
    for path in paths:
        if not path.is_dir():
            documents.append(_read(path))
            continue
        reports = [file for file in sorted(path.glob("*.json")) if file.stem in VERSIONS]
        if not reports:
            raise CheckpointError("no report in this folder", file=path, fix="give a folder that --report has written")
        documents += [_read(file) for file in reports]
    return documents


def _read(path: Path) -> Document:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _refused(f"expected a report of at most {_MOST_BYTES >> 20} MiB", str(path))
        value = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=path) from error
    except (ValueError, RecursionError) as error:
        where = str(error) if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "it is not valid"
        raise _refused(f"expected JSON: {where}", str(path)) from error
    return as_document(value, str(path))


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _refused(message: str, source: str) -> CheckpointError:
    return CheckpointError(message, file=source or None, fix="give a file that a command's --json or --report wrote")


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
