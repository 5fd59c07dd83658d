"""What an examination of evidence comes to: contradictions, each with the file that holds it."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = "aprjax.evidence/1"


@dataclass(frozen=True)
class Contradiction:
    """Something in a folder that disagrees with something else in it, or with the rules.

    Attributes:
        id: a stable slug: `file-altered`.
        file: the file concerned, from the evidence folder; empty for the folder itself.
        message: what was expected and what was found.
    """

    id: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file or '(the folder)'}: {self.message} ({self.id})"


@dataclass(frozen=True)
class EvidenceReport:
    """What `evidence` says of a folder.

    Attributes:
        folder: as it was given.
        kind: `check` (written by `check --evidence`), or `files` (sealed files of another measurement).
        files: how many files the manifest vouches for.
        nbytes: their sizes together.
        counts: outcomes by status, for a check.
        contradictions: everything that was found wrong; evidence with any is not accepted.
    """

    folder: Path
    kind: str
    files: int
    nbytes: int
    counts: dict[str, int]
    contradictions: tuple[Contradiction, ...]

    @property
    def accepted(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.contradictions

    @property
    def exit_code(self) -> int:
        """0 accepted, 1 contradicted."""
        return int(not self.accepted)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "schema": SCHEMA,
            "folder": str(self.folder),
            "kind": self.kind,
            "accepted": self.accepted,
            "files": self.files,
            "bytes": self.nbytes,
            "counts": dict(self.counts),
            "contradictions": [asdict(contradiction) for contradiction in self.contradictions],
        }

    def to_frame(self) -> Any:
        """A row per contradiction as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([asdict(c) for c in self.contradictions], columns=["id", "file", "message"])

    def top(self, k: int = 10) -> list[Contradiction]:
        """The first k contradictions, in the order in which the examination met them."""
        return list(self.contradictions[:k])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(c.file)}</td><td>{html.escape(c.message)}</td><td>{html.escape(c.id)}</td></tr>"
            for c in self.contradictions
        )
        verdict = "accepted" if self.accepted else f"{len(self.contradictions)} contradictions"
        return f"<p><b>{html.escape(str(self.folder))}</b>: {verdict}</p><table>{rows}</table>"


def dump(document: Any) -> bytes:
    """A document as every evidence file has it: JSON in ASCII, two spaces, a line end; NaN has no place in it."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode("ascii")
