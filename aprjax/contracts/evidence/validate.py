"""The examination of an evidence folder: nothing missing, added or altered, and nothing in it contradicts the rest.

First the folder against its manifest, then what the files say: a check's log against its raw report, both against every
discharge document, verdicts against the numbers that they stand on. What cannot be read is a contradiction, too:
evidence that nobody can read is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence.documents import DOCUMENT, LOG, RAW
from aprjax.contracts.evidence.findings import Contradiction, EvidenceReport
from aprjax.contracts.evidence.foreign_rules import judge_file, known_models
from aprjax.contracts.evidence.manifest import MANIFEST, check_manifest
from aprjax.contracts.evidence.rules import judge_check
from aprjax.contracts.facts import names_a_place
from aprjax.contracts.reading import Unreadable, read_document, read_text


def validate_folder(folder: str | Path) -> EvidenceReport:
    """Examines one evidence folder.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("expected an evidence folder, found none", file=folder, fix="check the path")
    # By its own name, under whatever name it is given (`.`).
    place = folder.resolve()
    vouched, wrong = check_manifest(place)
    kind, counts, found = examine_files(place, sorted(vouched))
    nbytes = sum(entry.nbytes for entry in vouched.values())
    return EvidenceReport(folder, kind, len(vouched), nbytes, counts, tuple(dict.fromkeys([*wrong, *found])))


def validate_folders(folders: Iterable[str | Path]) -> list[EvidenceReport]:
    """Examines several folders, and what only shows among them: one model file under two SHA-256."""
    reports = [validate_folder(folder) for folder in folders]
    seen: dict[str, tuple[str, Path]] = {}
    for index, report in enumerate(reports):
        for name, sha256 in _artifacts(report.folder):
            first = seen.setdefault(name, (sha256, report.folder))
            if first[0] != sha256:
                message = f"{name} has SHA-256 {sha256} here, and {first[0]} in {first[1].name}"
                contradiction = Contradiction("artifact-differs", "", message)
                reports[index] = _with(reports[index], contradiction)
    return reports


def examine_files(folder: Path, names: Sequence[str]) -> tuple[str, dict[str, int], list[Contradiction]]:
    """What the files of a folder say, apart from its manifest.

    Args:
        folder: the evidence folder.
        names: the files to read, by their paths in it.

    Returns:
        The kind of the evidence, its counts, and the contradictions.
    """
    wrong: list[Contradiction] = []
    documents = {}
    for name in names:
        try:
            text = read_text(folder / name) if name.endswith((".json", ".log", ".txt", ".md", ".py")) else ""
            if name.endswith(".json"):
                documents[name] = read_document(folder / name)
        except Unreadable as error:
            wrong.append(Contradiction("unreadable", name, str(error)))
            continue
        place = names_a_place(text) if name.endswith((".json", ".log", ".txt", ".md")) else None
        if place is not None:
            wrong.append(
                Contradiction("names-a-place", name, f"an absolute path of somebody's machine: {place!r:.120}")
            )
    for name, document in documents.items():
        wrong += judge_file(folder, name, document, names)
    is_check = any(name in (LOG, RAW) or name.endswith(f"/{DOCUMENT}") for name in names)
    if not is_check or (DOCUMENT in names and LOG not in names):
        return "files", {}, wrong
    counts, found = judge_check(folder, names, documents)
    return "check", counts, [*wrong, *found]


def unsealed_names(folder: Path) -> list[str]:
    """The files that a manifest of the folder would list."""
    from aprjax.contracts.evidence.manifest import files_in

    return [name for name, path in files_in(folder) if name != MANIFEST and path.is_file() and not path.is_symlink()]


def _artifacts(folder: Path) -> list[tuple[str, str]]:
    """Names and digests of the model files that a check's documents speak of."""
    try:
        raw = read_document(folder / RAW)
        sides = raw["sides"].values()
        found = [(Path(side["path"]).name, side["sha256"]) for side in sides if side["sha256"]]
    except (Unreadable, KeyError, TypeError, AttributeError):
        return []
    known = known_models()
    # Files that we made have the names that users gave them: only the official ones mean the same file everywhere.
    return [(name, sha256) for name, sha256 in found if name in known]


def _with(report: EvidenceReport, contradiction: Contradiction) -> EvidenceReport:
    from dataclasses import replace

    return replace(report, contradictions=(*report.contradictions, contradiction))
