"""Sections of judgements with their grounds: `explain` (hypotheses) and `check` (contracts)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from aprjax.bisect.page.causes import confidence
from aprjax.bisect.page.formats import number, place, rounded
from aprjax.bisect.page.parts import Bar, Block, Row, bars, columns, facts, paragraph, table

# Of a contract's tests, what a reader looks for first.
_ORDER = {"fail": 0, "unmeasured": 1, "pass": 2}


def explain_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of an `explain` report."""
    blocks = []
    counts = ", ".join(f"{count} {name}" for name, count in (report.get("counts") or {}).items() if count)
    text = f"{report.get('tokens')} tokens, {report.get('arithmetic')} arithmetic" + (
        f"; nodes: {counts}." if counts else "."
    )
    blocks.append(Block("", paragraph(text), plain=True))
    identity = report.get("identity") or []
    if identity:
        rows = [
            Row(
                [f["id"], f["severity"], f["sentence"], confidence(f), f.get("next_step") or ""],
                _severity(f["severity"]),
            )
            for f in identity
        ]
        heads = columns("'mistake", "severity", "what was found", "how sure", "next")
        blocks.append(
            Block("What the trace is, and is not", table(heads, rows, label="Identity of the trace"), plain=True)
        )
    found = report.get("explanations") or []
    if found:
        note = (
            "The bar is what the explanation leaves of the difference, on a logarithmic scale from 1e−8 to 1; the line "
            "is what rounding explains."
        )
        blocks.append(Block("Explanations, in the order of their finding", _explanations(found), note))
        blocks.append(Block("Their numbers", _explanation_table(found), plain=True))
    left = report.get("unexplained") or []
    if left:
        rows = [
            [
                place(n["layer"], n["stage"]),
                number(n.get("before")),
                n.get("reason") or "",
                "; ".join(f"{t['id']} leaves {number(t.get('residual'), 2)}" for t in (n.get("excluded") or [])[:4]),
            ]
            for n in left
        ]
        heads = columns("node", "#differs by", "what is wrong", "tried and excluded")
        blocks.append(Block("What nothing explains", table(heads, rows, label="Unexplained nodes"), plain=True))
    return blocks


def _explanations(found: list[Mapping[str, Any]]) -> Markup:
    return bars(
        [
            Bar(
                f"{index}. {e['sentence']}",
                f"{number(e['before'], 2)} → {number(e['residual'], 2)}",
                _log_share(e["residual"]),
                "good" if e.get("complete", True) else "near",
                "✓" if e.get("complete", True) else "≈",
                confidence(e),
                _log_share(e["tolerance"]),
            )
            for index, e in enumerate(found, 1)
        ],
        label="Explanations",
    )


def _log_share(value: Any) -> float:
    """A relative difference on a scale from 1e-8 to 1."""
    if not isinstance(value, int | float) or not value > 0:
        return 0.0
    return min(1.0, max(0.004, (math.log10(value) + 8) / 8))


def _explanation_table(found: list[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            e["id"],
            e["kind"],
            ", ".join(f"{key} {_parameter(value)}" for key, value in (e.get("parameters") or {}).items()),
            ", ".join(e.get("stages") or []),
            _few(e.get("layers") or []),
            "; ".join(f"{r['id']} leaves {number(r.get('residual'), 2)}" for r in (e.get("rivals") or [])[:3]),
            e.get("next_step") or "",
        ]
        for e in found
    ]
    return table(
        columns("'hypothesis", "of the", "parameters", "stages", "layers", "nearest rivals", "next"),
        rows,
        label="Explanations in numbers",
    )


def _few(layers: list[int]) -> str:
    if len(layers) > 3 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:8])) + (" …" if len(layers) > 8 else "")


def _parameter(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        error = value.get("error", value.get("standard_error"))
        return number(value["value"]) + (f" ± {number(error, 2)}" if error is not None else "")
    return number(value) if isinstance(value, float) else str(value)


def _severity(severity: str) -> str:
    return {"error": "bad", "warning": "near"}.get(severity, "")


def check_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `check` report: a table for each contract."""
    outcomes = report["outcomes"]
    versions = {c["id"]: f"version {c['version']}, {c['status'] or 'no status'}" for c in report.get("contracts") or []}
    numbers = [(name, report.get(name)) for name in ("passed", "failed", "unmeasured")]
    blocks = [Block("", facts(numbers) + paragraph("What is unmeasured is never counted as passed."), plain=True)]
    heads = columns("?status", "'test", "rule", "why", "bound, and where it comes from", "measured")
    contracts: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        contracts.setdefault(outcome["contract_id"], []).append(outcome)
    worst_first = sorted(contracts.items(), key=lambda item: min(_ORDER.get(o["status"], 1) for o in item[1]))
    blocks.append(Block("Contracts", _contract_table(worst_first), plain=True))
    for contract, all_own in worst_first:
        own = sorted(all_own, key=lambda o: _ORDER.get(o["status"], 1))
        rows = [
            Row(
                [
                    o["status"],
                    o["test_id"],
                    o.get("rule") or "",
                    o["reason"],
                    ": ".join(part for part in (o.get("threshold"), o.get("basis")) if part),
                    ", ".join(f"{key} {_measured(value)}" for key, value in (o.get("measured") or {}).items()),
                ],
                {"fail": "bad"}.get(o["status"], ""),
            )
            for o in own
        ]
        body = table(heads, rows, label=f"Tests of {contract}")
        holds = own[0]["status"] != "fail"
        blocks.append(Block(contract, body, versions.get(contract, ""), folded=holds, plain=not holds))
    artifacts = sorted({name for o in outcomes for name in o.get("artifacts") or []})
    if artifacts:
        blocks.append(
            Block("Raw outputs", paragraph("; ".join(artifacts)), "Files of the evidence folder.", folded=True)
        )
    return blocks


def _contract_table(contracts: list[tuple[str, list[Mapping[str, Any]]]]) -> Markup:
    rows = []
    for contract, own in contracts:
        counts = [sum(o["status"] == status for o in own) for status in _ORDER]
        worst = next(status for status, count in zip(_ORDER, counts, strict=True) if count)
        told = ", ".join(
            f"{count} {name}" for count, name in zip(counts, ("failed", "unmeasured", "passed"), strict=True) if count
        )
        rows.append(Row([worst, f"{contract}: {told}"], "bad" if worst == "fail" else ""))
    return table(columns("?worst", "contract"), rows, label="Contracts")


def _measured(value: Any) -> str:
    return number(rounded(value)) if isinstance(value, float) else str(value)
