"""What files of known formats must fulfil: parity receipts, reports of `apr qa`, SHIP-002's parsed Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from aprjax.contracts.evidence.findings import Contradiction
from aprjax.contracts.reading import Unreadable, read_text


@cache
def known_models() -> dict[str, str]:
    """SHA-256 of the official model files, by name."""
    path = Path(__file__).resolve().parents[2] / "checkpoint" / "models.json"
    return {model["file"]: model["sha256"] for model in json.loads(path.read_text(encoding="utf-8")).values()}


def judge_file(folder: Path, name: str, document: Any, names: Sequence[str]) -> Iterator[Contradiction]:
    """The contradictions within a JSON file of a known format, and with the files beside it."""
    if not isinstance(document, dict):
        return
    yield from _official_digests(name, document)
    if document.get("schema") == "apr-parity-receipt/v2":
        from aprjax.contracts.upstream.receipt import receipt_problems

        for problem in receipt_problems(document, folder):
            yield Contradiction("receipt-contradicts", name, problem)
    if "gates_executed" in document and "gates" in document:
        from aprjax.contracts.upstream.qa import report_problems

        for problem in report_problems(document):
            yield Contradiction("qa-contradicts", name, problem)
    if name.rpartition("/")[2] == "ast-parse-result.json":
        yield from _parsed_python(folder, name, document, names)
    if name.rpartition("/")[2] == "discharge-evidence-v1.json":
        from aprjax.contracts.evidence.upstream_rules import judge_upstream

        yield from judge_upstream(folder, name, document, names)


def _official_digests(name: str, document: dict[str, Any]) -> Iterator[Contradiction]:
    """An official model file has one SHA-256, wherever a document speaks of it."""
    known = known_models()
    level: list[Any] = [document]
    while level:
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.values()
                path = next((item[key] for key in ("path", "canonical_path", "file") if key in item), None)
                sha256 = item.get("sha256")
                file = path.replace("\\", "/").rpartition("/")[2] if isinstance(path, str) else None
                if file in known and isinstance(sha256, str) and sha256 != known[file]:
                    message = f"{file} is said to have SHA-256 {sha256:.80}; the official file has {known[file]}"
                    yield Contradiction("artifact-differs", name, message)
            elif isinstance(item, list):
                deeper += item
        level = deeper


def _parsed_python(folder: Path, name: str, document: dict[str, Any], names: Sequence[str]) -> Iterator[Contradiction]:
    """The program beside it, parsed again, comes to what the result says."""
    from aprjax.text.python_completion import check_python

    here = name.rpartition("/")[0]
    programs = [n for n in names if n.rpartition("/")[0] == here and n.endswith("completion.py")]
    if len(programs) != 1:
        yield Contradiction("raw-missing", name, f"expected one …completion.py beside it, found {len(programs)}")
        return
    try:
        found = check_python(read_text(folder / programs[0])).to_json()
    except Unreadable as error:
        yield Contradiction("unreadable", programs[0], str(error))
        return
    for key in ("ast_parse", "syntax_errors", "ast_node_count", "function_count", "function_names"):
        if key in document and document[key] != found.get(key):
            message = f"{key} is {document[key]!r:.80}; {programs[0]}, parsed again, has {found.get(key)!r:.80}"
            yield Contradiction("count-mismatch", name, message)
