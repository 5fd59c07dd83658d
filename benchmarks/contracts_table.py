"""Write the tables of docs/contracts.md from the contracts and from what a check of a real pair reported.

    python -m aprjax check --model A.apr --ref B.gguf --json check.json
    python benchmarks/contracts_table.py check.json …

Between the document's two marks everything is made: a row for each test of each contract. Several reports are taken
together; what none of them has keeps the result that stands there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from aprjax.contracts.load import load_contracts
from aprjax.contracts.types import Contract, FalsificationTest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "contracts.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
HEAD = "| test | rule | bound test | bounds, each with its basis | on the real pair |\n|---|---|---|---|---|\n"
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", re.MULTILINE)


def contracts() -> list[Contract]:
    """Our contracts, in the order of their names."""
    loaded = load_contracts(sorted((ROOT / "contracts").glob("*.yaml")))
    return [one.contract for one in loaded if one.contract is not None]


def results_of(document: dict[str, Any]) -> dict[str, str]:
    """What a check said, by test: status and reason."""
    return {one["test_id"]: cell(f"**{one['status']}**: {one['reason']}") for one in document["outcomes"]}


def results_in(text: str) -> dict[str, str]:
    """The results that stand in the document."""
    return dict(_ROW.findall(text))


def cell(text: str) -> str:
    """Text as a table's cell."""
    return " ".join(text.split()).replace("|", "&#124;").replace("<", "&lt;")


def row(test: FalsificationTest, results: dict[str, str]) -> str:
    """One test's row."""
    bound = f"`{cell(test.test.removeprefix('python3 -m pytest '))}`" if test.test else "none"
    bounds = "; ".join(f"{cell(str(t))} ({cell(t.basis)})" for t in test.thresholds) or "none"
    if test.not_applicable:
        result = cell(f"not about two sides: {test.na_reason} ({test.na_owner})")
    else:
        result = results.get(test.id, "**unmeasured**: not run on the real pair")
    return f"| `{test.id}` | {cell(test.rule)} | {bound} | {bounds} | {result} |\n"


def tables(results: dict[str, str]) -> str:
    """The tables of all contracts."""
    parts = []
    for contract in contracts():
        meta = contract.metadata
        rows = "".join(row(test, results) for test in contract.falsification_tests)
        about = f"{cell(meta.description)} Version {meta.version}, kind `{meta.kind}`, status {meta.status}."
        parts.append(f"### {contract.id}\n\n{about}\n\n{HEAD}{rows}")
    return "\n".join(parts)


def with_tables(text: str, results: dict[str, str]) -> str:
    """The document with its tables made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    results = results_in(text)
    for path in arguments:
        results |= results_of(json.loads(Path(path).read_text(encoding="utf-8")))
    DOCUMENT.write_text(with_tables(text, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
