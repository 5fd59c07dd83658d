"""What `python -m aprjax evidence` does with folders: examine them, or seal those in which nothing else is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence.findings import Contradiction, EvidenceReport
from aprjax.contracts.evidence.manifest import seal
from aprjax.contracts.evidence.validate import examine_files, unsealed_names, validate_folder, validate_folders
from aprjax.contracts.reading import Unreadable


def examine(folders: Sequence[Path]) -> list[EvidenceReport]:
    """Examines folders, each and among them.

    Raises:
        CheckpointError: one does not exist.
    """
    return validate_folders(folders)


def sealed(folders: Sequence[Path]) -> list[EvidenceReport]:
    """Seals each folder whose files do not contradict each other, and examines it.

    Raises:
        CheckpointError: one does not exist, or cannot be written to.
    """
    reports = []
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError("expected an evidence folder, found none", file=folder, fix="check the path")
        kind, counts, wrong = examine_files(folder.resolve(), unsealed_names(folder))
        if not wrong:
            try:
                seal(folder)
            except Unreadable as error:
                wrong = [Contradiction("not-a-plain-file", "", str(error))]
        if wrong:
            reports.append(EvidenceReport(folder, kind, 0, 0, counts, tuple(wrong)))
        else:
            reports.append(validate_folder(folder))
    return reports
