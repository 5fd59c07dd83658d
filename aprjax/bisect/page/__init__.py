"""The page that people send to each other: one self-contained HTML file from the JSON of one or several reports.

The analysis is elsewhere: everything here is a function of a report's JSON, so that a saved report is shown as a fresh
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["report_fragment", "write_combined", "write_report"]


def write_report(
    document: dict[str, Any],
    folder: Path,
    pictures: Mapping[str, Callable[[BinaryIO], None]] | None = None,
    *,
    beside: Iterable[str] = (),
) -> Path:
    """Writes `index.html`, `COMMAND.json` and pictures into a folder.

    Args:
        document: a command's JSON.
        folder: made where it is missing.
        pictures: by file name, what writes a PNG; they lie beside the page, which has its own.
        beside: names of files that the caller puts into the folder, for the page to link.

    Returns:
        The page's path.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    import json
    from urllib.parse import quote

    from aprjax.bisect.page.build import render_page
    from aprjax.bisect.page.documents import as_document
    from aprjax.bisect.page.made import stamped
    from aprjax.checkpoint.atomic import atomic_file

    made = as_document(stamped(document))
    _make_folder(folder)
    # The JSON first: what was measured must not be lost should a picture fail.
    with atomic_file(folder / f"{made.command}.json") as stream:
        stream.write((json.dumps(made.value, indent=1, allow_nan=False) + "\n").encode())
    for name, save in (pictures or {}).items():
        with atomic_file(folder / name) as stream:
            save(stream)
    links = {name: quote(name) for name in (f"{made.command}.json", *(pictures or {}), *beside)}
    with atomic_file(folder / "index.html") as stream:
        stream.write(render_page([made], links=links).encode())
    return folder / "index.html"


def write_combined(reports: Iterable[Path], folder: Path) -> Path:
    """Writes one `index.html` from saved reports.

    Args:
        reports: JSON files, or folders that hold them.
        folder: made where it is missing.

    Raises:
        CheckpointError: a file is no report, is of another version or incomplete; or the folder cannot be written to.
    """
    from aprjax.bisect.page.build import checked, render_page
    from aprjax.bisect.page.documents import read_documents
    from aprjax.checkpoint.atomic import atomic_file

    page = render_page([checked(document) for document in read_documents(reports)])
    _make_folder(folder)
    with atomic_file(folder / "index.html") as stream:
        stream.write(page.encode())
    return folder / "index.html"


def report_fragment(document: dict[str, Any]) -> str:
    """A report's verdict, cause and tables as HTML without style sheet and script: for notebooks."""
    from aprjax.bisect.page.build import fragment
    from aprjax.bisect.page.documents import as_document

    return fragment(as_document(document))


def _make_folder(folder: Path) -> None:
    from aprjax.checkpoint.types import CheckpointError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the report's folder cannot be made: {error.strerror or error}", file=folder, fix="choose another folder"
        ) from error
