"""What is wrong with a contract or its evidence: each problem with its file, its line and the rule that it breaks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["warning", "error"]


@dataclass(frozen=True, order=True)
class Problem:
    """One problem.

    Attributes:
        path: of the file.
        line: from 1; 0 where the whole file is meant.
        rule: upstream's id (`SCHEMA-007`) where it is upstream's rule, otherwise one of ours (`CONTRACT-…`,
            `BINDING-…`, `EVIDENCE-…`).
        message: what was found, what was expected, and what to do.
        severity: an error makes a contract invalid; a warning does not.
    """

    path: Path
    line: int
    rule: str
    message: str
    severity: Severity = "error"

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else str(self.path)
        return f"{place}: {self.severity}: {self.message} ({self.rule})"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "path": str(self.path)}
