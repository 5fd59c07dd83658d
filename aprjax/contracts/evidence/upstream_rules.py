"""Discharge documents as upstream writes them, held against the raw files beside them.

Upstream checks no field of these (contracts.md sections 1.1 and 6), and one of its documents quotes an error that its
log does not have (section 4). A path may be followed by a remark in parentheses, which is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aprjax.contracts.evidence.findings import Contradiction
from aprjax.contracts.evidence.lifecycle import TEST_STATUSES
from aprjax.contracts.reading import Unreadable, expect, read_document, read_text

_PATHS = ("raw_run_output", "raw_qa_output", "model_completion", "ast_parse_result", "raw_diff_json")
# Names of error codes: capitals with two underscores or more. What no tool has printed was typed from memory.
_CODE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+){2,}\b")
_REMARK = re.compile(r"\s*\(.*\)\s*$", re.DOTALL)


def judge_upstream(folder: Path, name: str, document: dict[str, Any], names: Sequence[str]) -> Iterator[Contradiction]:
    """The contradictions of a document that is not ours (ours have rules of their own)."""
    if "rule_sha256" in document:
        return
    try:
        yield from _fields(name, document)
        files = dict(_files(name, document, names))
        for key, file in files.items():
            if file is None:
                yield Contradiction(
                    "path-dangles", name, f"{key} names {document[key]!r:.160}, which is not in the folder"
                )
        yield from _quotes(folder, name, document, [file for file in files.values() if file is not None])
        if files.get("raw_qa_output") is not None:
            yield from _gates(name, document, read_document(folder / str(files["raw_qa_output"])))
        if files.get("ast_parse_result") is not None:
            yield from _parsed(name, document, read_document(folder / str(files["ast_parse_result"])))
        if files.get("model_completion") is not None and "completion_text" in document:
            written = read_text(folder / str(files["model_completion"]))
            if str(document["completion_text"]).strip() != written.strip():
                yield Contradiction("fact-mismatch", name, "completion_text is not what the completion's file holds")
    except (Unreadable, TypeError, KeyError, AttributeError) as error:
        yield Contradiction("wrong-type", name, str(error))


def _fields(name: str, document: dict[str, Any]) -> Iterator[Contradiction]:
    for key in ("evidence_id", "binds_to", "falsification_id", "command"):
        expect(document, key, str)
    for key in ("discharge_status", "previous_status"):
        if key in document:
            status = _REMARK.sub("", expect(document, key, str))
            if status not in TEST_STATUSES:
                yield Contradiction("status-unknown", name, f"{key} is {status!r:.80}, which is no status of a test")
    artifact = document.get("shipped_artifact")
    if artifact is not None and not re.fullmatch(r"[0-9a-f]{64}", expect(artifact, "sha256", str)):
        yield Contradiction("wrong-type", name, "the artifact's sha256 is no 64 lower-case hex digits")
    chain = expect(document, "verification_chain", list)
    failed = [step for step in chain if str(step.get("verdict", "")).lower().startswith("fail")]
    if document.get("discharge_status") == "DISCHARGED" and failed:
        yield Contradiction(
            "verdict-contradicts", name, f"discharged, and step {failed[0].get('step')} of its chain fails"
        )


def _files(name: str, document: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each raw file that the document names, by the folder's name for it; None where it is not there."""
    here = name.rpartition("/")[0]
    for key in _PATHS:
        if key in document:
            base = re.split(r"[/\\]", _REMARK.sub("", expect(document, key, str)))[-1]
            beside = f"{here}/{base}" if here else base
            yield key, beside if beside in names else None


def _quotes(folder: Path, name: str, document: dict[str, Any], files: Sequence[str]) -> Iterator[Contradiction]:
    """Error codes that the chain speaks of stand in one of the raw files."""
    if not files:
        return
    raw = "\n".join(read_text(folder / file) for file in files)
    for step in document["verification_chain"]:
        for key in ("evidence", "observations"):
            for code in dict.fromkeys(_CODE.findall(str(step.get(key, "")))):
                if code not in raw:
                    message = f"step {step.get('step')} quotes {code}, which none of the raw files has"
                    yield Contradiction("not-in-raw", name, message)


def _gates(name: str, document: dict[str, Any], report: Any) -> Iterator[Contradiction]:
    """Counts, names and messages of gates are the raw report's, and a skipped gate is none that passed."""
    gates = {expect(gate, "name", str): gate for gate in expect(report, "gates", list)}
    executed = {key: gate for key, gate in gates.items() if not expect(gate, "skipped", bool)}
    truth = {"total_gates": len(gates), "executed": len(executed), "skipped": len(gates) - len(executed)}
    summary = document.get("qa_gates_summary", {})
    for key, count in truth.items():
        if key in summary and summary[key] != count:
            yield Contradiction("count-mismatch", name, f"{key} is {summary[key]!r:.40}; the raw report has {count}")
    for key, expected in (("gates_executed", set(executed)), ("gates_skipped", set(gates) - set(executed))):
        if key not in document:
            continue
        listed = {expect(gate, "name", str) for gate in expect(document, key, list)}
        for gate in sorted(listed ^ expected):
            where = "lists it, the raw report does not" if gate in listed else "leaves it out"
            yield Contradiction("count-mismatch", name, f"{key}: {gate}: the document {where}")
        for gate in document[key]:
            told = gates.get(gate["name"], {}).get("message")
            if "message" in gate and told is not None and gate["message"] != told:
                message = f"{gate['name']} is quoted as {gate['message']!r:.100}; the raw report has {told!r:.100}"
                yield Contradiction("fact-mismatch", name, message)
    passed = document.get("discharge_proof", {}).get("observed_passed_gates")
    really = sum(bool(gate["passed"]) for gate in executed.values())
    if passed is not None and passed != really:
        message = f"{passed} gates are said to have passed; {really} ran and passed, {truth['skipped']} were skipped"
        yield Contradiction("unmeasured-as-passed", name, message)


def _parsed(name: str, document: dict[str, Any], result: Any) -> Iterator[Contradiction]:
    """What the document says of the parsed program is what the parser's result says."""
    for key, told in document.get("ast_summary", {}).items():
        if key in result and result[key] != told:
            message = f"{key} is {told!r:.80}; ast-parse-result.json has {result[key]!r:.80}"
            yield Contradiction("count-mismatch", name, message)
