"""`MANIFEST.json`: every file of an evidence folder with its size and SHA-256: nothing can be added, lost or altered.

A folder is sealed once it is written; who changes it on purpose seals it again (`python -m aprjax evidence --seal`),
and the change of the manifest shows in the history.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from aprjax.checkpoint.atomic import atomic_file
from aprjax.contracts.evidence.findings import Contradiction, dump
from aprjax.contracts.reading import MOST_BYTES, Unreadable, expect, read_bytes, read_document

MANIFEST = "MANIFEST.json"
SCHEMA = "aprjax.evidence-manifest/1"
# What Python leaves beside the scripts of a folder; git ignores it, too.
_LEFT_ALONE = "__pycache__"
# A folder has some hundred files; more is another kind of folder, given by mistake.
_MOST_FILES = 10_000


@dataclass(frozen=True)
class Entry:
    """A file that the manifest vouches for."""

    path: str
    nbytes: int
    sha256: str


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every entry below a folder that is no folder, by its path from it; links are entries and never followed."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if name != _LEFT_ALONE)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(parent) / name
            yield path.relative_to(folder).as_posix(), path


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path) -> int:
    """Writes the manifest of what is in a folder now, and returns how many files it vouches for.

    Raises:
        Unreadable: there is something that no manifest can vouch for: a link, a device, a file too large.
    """
    entries = []
    for name, path in files_in(folder):
        if name == MANIFEST:
            continue
        if len(entries) >= _MOST_FILES or name.startswith(".git/"):
            raise Unreadable(f"{folder} is no evidence folder: a repository, or more than {_MOST_FILES} files")
        problem = _unsealable(name, path)
        if problem is not None:
            raise Unreadable(f"{name}: {problem}")
        entries.append({"path": name, "bytes": path.stat().st_size, "sha256": digest(path)})
    if not entries:
        raise Unreadable("there is no file to vouch for")
    entries.sort(key=lambda entry: entry["path"])
    with atomic_file(folder / MANIFEST) as stream:
        stream.write(dump({"schema": SCHEMA, "files": entries}))
    return len(entries)


def check_manifest(folder: Path) -> tuple[dict[str, Entry], list[Contradiction]]:
    """Holds a folder against its manifest.

    Returns:
        The files that are there as the manifest has them, by name, and everything that is not.
    """
    found: dict[str, Path] = {}
    wrong: list[Contradiction] = []
    for name, path in files_in(folder):
        if len(found) >= _MOST_FILES:
            wrong.append(Contradiction("too-many-files", "", f"more than {_MOST_FILES} files"))
            return {}, wrong
        found[name] = path
    wrong += [
        Contradiction("not-a-plain-file", name, problem)
        for name, path in found.items()
        if (problem := _unsealable(name, path)) is not None
    ]
    try:
        entries = _entries(folder / MANIFEST)
    except FileNotFoundError:
        wrong.append(
            Contradiction(
                "manifest-missing", MANIFEST, "the folder is not sealed: `python -m aprjax evidence --seal` does that"
            )
        )
        return {}, wrong
    except Unreadable as error:
        wrong.append(Contradiction("manifest-unreadable", MANIFEST, str(error)))
        return {}, wrong
    bad = {contradiction.file for contradiction in wrong}
    vouched: dict[str, Entry] = {}
    for entry in entries:
        problem = _bad_name(entry.path)
        if problem is not None:
            wrong.append(Contradiction("path-escapes", MANIFEST, f"{entry.path!r:.200} {problem}"))
        elif entry.path in vouched:
            wrong.append(Contradiction("listed-twice", MANIFEST, f"{entry.path} is listed twice"))
        elif entry.path not in found:
            wrong.append(Contradiction("file-missing", entry.path, "the manifest lists it, and it is not there"))
        elif entry.path not in bad:
            wrong += _altered(entry, found[entry.path])
            vouched[entry.path] = entry
    listed = {entry.path for entry in entries}
    wrong += [
        Contradiction("file-extra", name, "it is there, and the manifest does not list it")
        for name in found
        if name not in listed and name != MANIFEST
    ]
    return vouched, wrong


def _entries(path: Path) -> list[Entry]:
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(path)
    document = read_document(path)
    if expect(document, "schema", str) != SCHEMA:
        raise Unreadable(f"expected the schema {SCHEMA}, found {document['schema']!r:.80}")
    entries = []
    for item in expect(document, "files", list):
        sha256, nbytes = expect(item, "sha256", str), expect(item, "bytes", int)
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or nbytes < 0:
            raise Unreadable(
                f"{expect(item, 'path', str)!r:.120} has no SHA-256 of 64 lower-case hex digits, or no size"
            )
        entries.append(Entry(expect(item, "path", str), nbytes, sha256))
    # Nothing vouches for the manifest but its form: one text for one folder.
    listed = [{"path": entry.path, "bytes": entry.nbytes, "sha256": entry.sha256} for entry in entries]
    if read_bytes(path) != dump({"schema": SCHEMA, "files": listed}):
        raise Unreadable("it is not as `evidence --seal` writes it")
    return entries


def _bad_name(name: str) -> str | None:
    """Why a listed name cannot be that of a file below the folder."""
    parts = PurePosixPath(name).parts
    if not name or "\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ":" in parts[0]:
        return "is no path below the folder"
    if ".." in parts or PurePosixPath(name).as_posix() != name or name == MANIFEST:
        return "leads out of the folder, or is written in a way that hides where it leads"
    return None


def _unsealable(name: str, path: Path) -> str | None:
    """Why a manifest cannot vouch for what stands at a path."""
    try:
        status = path.lstat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISLNK(status.st_mode):
        return "a link: its content lies somewhere else"
    if not stat.S_ISREG(status.st_mode):
        return "neither a file nor a folder"
    if status.st_size > MOST_BYTES:
        return f"{status.st_size} bytes; evidence files have at most {MOST_BYTES}"
    return None if name == MANIFEST or _bad_name(name) is None else "its name cannot be listed"


def _altered(entry: Entry, path: Path) -> list[Contradiction]:
    nbytes = path.stat().st_size
    if nbytes != entry.nbytes:
        return [Contradiction("file-altered", entry.path, f"expected {entry.nbytes} bytes, found {nbytes}")]
    found = digest(path)
    if found != entry.sha256:
        return [Contradiction("file-altered", entry.path, f"expected SHA-256 {entry.sha256}, found {found}")]
    return []
