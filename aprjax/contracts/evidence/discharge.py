"""`--discharge`: a contract's statuses moved along their lifecycle by evidence that holds, or the reason why not.

Nothing moves unless the folder is accepted, is about this contract, and about what the contract demands today
(`rule_sha256`); unless it compares two things, one of them a file that anybody can get, by a source that anybody can
have. A status only moves forward. The file's text changes where a status or a reference to evidence stands,
and nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence.documents import DOCUMENT, folder_of, rule_digest
from aprjax.contracts.evidence.findings import EvidenceReport
from aprjax.contracts.evidence.foreign_rules import known_models
from aprjax.contracts.evidence.lifecycle import CONTRACT_LADDER, TEST_LADDER, contract_target, status_of
from aprjax.contracts.evidence.manifest import digest
from aprjax.contracts.evidence.yaml_edit import EditError, YamlText
from aprjax.contracts.reading import Unreadable, read_document, read_text
from aprjax.contracts.types import Contract, FalsificationTest, Status

SCHEMA = "aprjax.discharge/1"


class Refused(Exception):
    """Evidence that moves nothing; says why."""


@dataclass(frozen=True)
class Move:
    """A status that moves: of the contract (`test_id` is empty), or of one of its tests."""

    test_id: str
    before: str
    after: str


@dataclass(frozen=True)
class Discharge:
    """What evidence moves in a contract's file."""

    contract: Path
    evidence: Path
    moves: tuple[Move, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "schema": SCHEMA,
            "contract": str(self.contract),
            "evidence": str(self.evidence),
            "moves": [asdict(move) for move in self.moves],
        }


def discharge(report: EvidenceReport, path: Path) -> Discharge:
    """Moves the statuses in a contract's file by an examined evidence folder.

    Args:
        report: of the folder.
        path: the contract's file, in `contracts/` beside the folder's `evidence/`.

    Raises:
        Refused: the evidence does not hold, is about something else, or moves nothing.
        CheckpointError: the contract cannot be read or written.
    """
    contract = _contract(path)
    if not report.accepted:
        first = report.contradictions[0]
        raise Refused(f"the evidence has {len(report.contradictions)} contradictions, the first: {first}")
    documents = _documents(report.folder, contract)
    outcomes = [_outcome(document) for document in documents.values()]
    _worth_a_status(next(iter(documents.values())))
    missing = [test.id for test in contract.falsification_tests if test.id not in documents]
    if missing:
        raise Refused(f"the evidence says nothing of {', '.join(missing)}")
    if Status.FAIL in outcomes:
        failed = [test_id for test_id, document in documents.items() if _outcome(document) == Status.FAIL]
        raise Refused(f"{', '.join(failed)} failed: evidence of a failure discharges nothing")
    try:
        text = YamlText(read_text(path))
        moves = [
            *_move_contract(text, contract, outcomes),
            *_move_tests(text, contract, documents, report.folder, path),
        ]
    except (EditError, Unreadable) as error:
        raise Refused(f"{path.name} cannot be edited in place: {error}") from error
    if not moves:
        raise Refused("every status stands where this evidence would move it")
    with atomic_file(path) as stream:
        stream.write(text.text.encode("utf-8"))
    return Discharge(path, report.folder, tuple(moves))


def _contract(path: Path) -> Contract:
    from aprjax.contracts.load import load_contract

    try:
        loaded = load_contract(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path, fix="check the path") from error
    if loaded.contract is None:
        first = loaded.errors[0]
        raise CheckpointError(
            f"no valid contract: {first}", file=path, fix="`python -m aprjax lint` lists every problem"
        )
    return loaded.contract


def _documents(folder: Path, contract: Contract) -> dict[str, dict[str, Any]]:
    """The documents of the contract's tests, by test id.

    Raises:
        Refused: there is none, or one is about another rule than the contract's today.
    """
    found = {}
    for test in contract.falsification_tests:
        path = folder / folder_of(contract.id, test.id) / DOCUMENT
        if not path.is_file():
            continue
        try:
            document = read_document(path)
        except Unreadable as error:
            raise Refused(f"{path.name} of {test.id}: {error}") from error
        if document["rule_sha256"] != rule_digest(test):
            raise Refused(f"{test.id} demands something else today than when this evidence was written")
        found[test.id] = document
    if not found:
        raise Refused(f"the evidence is not about {contract.id}")
    return found


def _worth_a_status(document: dict[str, Any]) -> None:
    """Refuses evidence that is sound and proves nothing to anybody else."""
    model, ref = document["shipped_artifact"], document["reference_artifact"]
    if model is not None and ref is not None:
        same = all(model[key] == ref[key] for key in ("sha256", "arithmetic"))
        if same:
            raise Refused("a file was compared with itself by one arithmetic: that agrees by construction")
    digests = {side["sha256"] for side in (model, ref) if side is not None}
    if not digests & set(known_models().values()):
        raise Refused("neither side is a file that others can get: check against one that `fetch` knows")
    if document["versions"]["git_modified"]:
        raise Refused(
            "aprjax's source was changed since its commit: nobody can run again what ran; check from a clean clone"
        )


def _outcome(document: dict[str, Any]) -> str:
    return document["discharge_proof"]["verdict"].partition(" — ")[0].lower()


def _move_contract(text: YamlText, contract: Contract, outcomes: list[str]) -> list[Move]:
    target, before = contract_target(outcomes), contract.metadata.status
    if target is None or before == target:
        return []
    if before is not None and before not in CONTRACT_LADDER:
        raise Refused(f"the contract is {before}: a person decides what comes after that, no run")
    if before is not None and CONTRACT_LADDER.index(before) >= CONTRACT_LADDER.index(target):
        return []
    if before is None:
        text.insert_below(("metadata", "version"), "status", target)
    else:
        text.replace(("metadata", "status"), target)
    return [Move("", before or "(none)", target)]


def _move_tests(
    text: YamlText, contract: Contract, documents: dict[str, dict[str, Any]], folder: Path, path: Path
) -> list[Move]:
    moves = []
    for index, test in enumerate(contract.falsification_tests):
        document = documents[test.id]
        before, after = status_of(test), document["discharge_status"]
        if _outcome(document) != Status.PASS or TEST_LADDER.index(after) <= TEST_LADDER.index(before):
            continue
        here = ("falsification_tests", index)
        if test.discharge_status is not None:
            text.replace((*here, "discharge_status"), after)
        elif test.status is not None:
            text.replace((*here, "status"), after)
        else:
            text.insert_below((*here, "id"), "status", after)
        _refer(text, here, test, folder / folder_of(contract.id, test.id) / DOCUMENT, path)
        moves.append(Move(test.id, before, after))
    return moves


def _refer(text: YamlText, here: tuple[str | int, ...], test: FalsificationTest, document: Path, path: Path) -> None:
    """Names the document, with its SHA-256, in the test's `evidence`."""
    root = path.resolve().parent.parent
    try:
        name = document.resolve().relative_to(root).as_posix()
    except ValueError:
        raise Refused("the evidence lies outside the contract's repository: write it to evidence/ there") from None
    sha256 = digest(document)
    for number, entry in enumerate(test.evidence):
        if entry.path == name:
            text.replace((*here, "evidence", number, "sha256"), sha256)
            return
    entry = {"path": name, "sha256": sha256}
    if test.evidence:
        text.append((*here, "evidence"), entry)
    else:
        text.insert_below((*here, "id"), "evidence", [entry])
