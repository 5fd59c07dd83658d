"""Every folder of `evidence/` is sealed, and nothing in it contradicts anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprjax.contracts.evidence.validate import validate_folder, validate_folders

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in (ROOT / "evidence").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_accepted(folder: Path) -> None:
    # After a change on purpose: `python -m aprjax evidence --seal evidence/<folder>`.
    assert list(map(str, validate_folder(folder).contradictions)) == []


def test_the_folders_agree() -> None:
    assert len(FOLDERS) >= 3
    assert all(report.accepted for report in validate_folders(FOLDERS))
