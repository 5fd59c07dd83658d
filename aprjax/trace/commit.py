"""The commit of the source that runs, for whoever writes down what was measured."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def source_commit() -> tuple[str | None, bool | None]:
    """The commit of aprjax's source, and whether that source was changed since; None where git does not say."""
    commit = _git("rev-parse", "HEAD")
    if commit is None or not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None, None
    changes = _git("status", "--porcelain", "--", "aprjax")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    # An installed package lies in no repository of its own, though perhaps in somebody else's.
    if not (_ROOT / ".git").exists():
        return None
    try:
        outcome = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return outcome.stdout.strip() if outcome.returncode == 0 else None
