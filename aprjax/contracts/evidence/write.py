"""The writer: a check's log, its raw report, and a discharge document per test, in a folder that is whole or absent."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aprjax.checkpoint.atomic import atomic_file, atomic_folder
from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence.documents import DOCUMENT, LOG, RAW, discharge_document, folder_of
from aprjax.contracts.evidence.findings import dump
from aprjax.contracts.evidence.log import LogError, log_text, parse_log
from aprjax.contracts.evidence.manifest import seal
from aprjax.contracts.evidence.receipts import QA_OUTPUT, qa_document, receipts
from aprjax.contracts.facts import host_facts, version_facts, without_places
from aprjax.contracts.reading import Unreadable, parse_document
from aprjax.contracts.types import CheckReport

# Beyond this many evidence folders of one contract on one day, something writes them in a loop.
_MOST_A_DAY = 1000


def check_root(root: str | Path) -> None:
    """Refuses, before minutes of work, a place where no evidence could be written after them.

    Raises:
        CheckpointError: a file stands where the folder is to be.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise CheckpointError("a file stands where evidence is to be written", file=root, fix="choose a folder")


def write_evidence(report: CheckReport, root: str | Path) -> Path:
    """Writes the evidence of a check as `<root>/<id>-<date>/`, sealed, and returns that folder.

    The id is the contract's, or `check` where several were checked. The log and the raw report are written first; all
    that the documents say is parsed back from these two texts.

    Raises:
        CheckpointError: the folder cannot be written, or the report names a test that none of its contracts has.
    """
    check_root(root)
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot be made: {error.strerror}", file=root, fix="choose another folder") from error
    folder = _free_name(root, report)
    try:
        files = _files(report, folder.name)
    except (LogError, Unreadable, ValueError) as error:
        raise CheckpointError(f"the check cannot be put down as evidence: {error}", file=folder) from error
    with atomic_folder(folder) as partial:
        for name, content in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as stream:
                stream.write(content)
        try:
            seal(partial)
        except Unreadable as error:
            raise CheckpointError(f"cannot be sealed: {error}", file=folder, fix="check fewer contracts") from error
    return folder


def _files(report: CheckReport, folder: str) -> dict[str, bytes]:
    """Every file of the folder, by its path in it."""
    log_lines = without_places(log_text(report))
    raw_text = dump(_finite(without_places(report.to_json())))
    files = {LOG: log_lines.encode("utf-8"), RAW: raw_text}
    for name, content in report.artifacts.items():
        files[f"raw/{_plain(name)}"] = without_places(content).encode("utf-8", "replace")
    # From here on, only what the two texts say counts.
    log, raw = parse_log(log_lines), parse_document(raw_text.decode("ascii"))
    host, versions = host_facts(), version_facts()
    raw_files = {name: files[f"raw/{name}"].decode("utf-8") for name in report.artifacts}
    for name, document in receipts(raw, raw_files, folder=folder, host=host, versions=versions).items():
        files[name] = dump(document)
    gates = qa_document(raw)
    if gates is not None:
        files[QA_OUTPUT] = dump(gates)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    tests = {(c.id, test.id): (c, test) for c in report.contracts for test in c.falsification_tests}
    for logged in log.tests:
        key = (logged.contract_id, logged.test_id)
        if key not in tests:
            raise CheckpointError(
                f"the check has an outcome of {key[1]}, and no contract {key[0]} with such a test",
                fix="this is a fault of aprjax: please report it",
            )
        document = discharge_document(
            *tests[key], logged, log, raw, folder=folder, host=host, versions=versions, finished=finished
        )
        files[f"{folder_of(*key)}/{DOCUMENT}"] = dump(without_places(document))
    return files


def _free_name(root: Path, report: CheckReport) -> Path:
    ids = {contract.id for contract in report.contracts}
    name = f"{ids.pop() if len(ids) == 1 else 'check'}-{report.started[:10]}"
    for number in range(1, _MOST_A_DAY):
        folder = root / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
    raise CheckpointError(f"{name} and {_MOST_A_DAY} more are already there", file=root, fix="choose another folder")


def _plain(name: str) -> str:
    """An artifact's name, if it is the name of a file and nothing more."""
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{name!r} is no file name for a raw output", fix="this is a fault of aprjax: report it")
    return name


def _finite(value: Any) -> Any:
    """NaN and infinities as null: they are no measurement, and JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
