"""The report folder of `chatml`: one self-contained page, and the JSON."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from aprjax.bisect.chatml.report import ChatmlReport
from aprjax.checkpoint.atomic import atomic_file

_STYLE = """
:root{color-scheme:light dark;--ok:#1a7f37;--bad:#cf222e;--warn:#9a6700;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}
.part,.supported,.degenerate,.loops,.wrong{color:var(--bad)}.alike,.refuted,.clean{color:var(--ok)}
.undecidable,.not-decidable,.flagged{color:var(--warn)}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.number{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}code{font-size:.85em;overflow-wrap:anywhere;white-space:pre-wrap}
"""


def write_report(report: ChatmlReport, document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html` and `chatml.json` into `folder`; returns the page's path.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "chatml.json") as stream:
        stream.write(json.dumps(document, indent=1, allow_nan=False).encode())
    page = folder / "index.html"
    with atomic_file(page) as stream:
        stream.write(_page(report).encode())
    return page


def summary_html(report: ChatmlReport) -> str:
    """Verdict, causes and claims, as an HTML fragment (used by notebooks)."""
    blamed = ", ".join(report.causes.blamed)
    cause = f"<p><strong>Cause:</strong> {escape(blamed)}</p>" if blamed else ""
    rows = "".join(
        f"<tr><td>{escape(claim.claim)}</td><td class='{claim.verdict.replace(' ', '-')}'>{claim.verdict}</td>"
        f"<td>{escape(claim.reason)}{_evidence(claim.evidence)}</td></tr>"
        for claim in report.claims
    )
    return (
        f'<h2 class="{report.verdict}">{report.verdict}</h2><p>{escape(report.causes.reason)}</p>{cause}'
        f"{_table(['claim', 'these files', 'why'], rows)}"
    )


def _evidence(cells: tuple[str, ...]) -> str:
    if not cells:
        return ""
    listed = "".join(f"<li>{escape(cell)}</li>" for cell in cells)
    return f"<details><summary>{len(cells)} cells</summary><ul>{listed}</ul></details>"


def _page(report: ChatmlReport) -> str:
    factorial = report.factorial
    sides = "".join(
        f"<tr><td>{name}</td><td><code>{escape(side.path)}</code></td><td>{side.format}</td>"
        f"<td>{', '.join(map(str, sorted(side.declared_stops))) or 'none'}</td><td><code>{side.sha256}</code></td></tr>"
        for name, side in factorial.sides.items()
    )
    cells = "".join(
        f"<tr><td>{cell.side}</td><td>{escape(cell.prompt)}</td><td>{cell.wrap}</td><td>{escape(cell.arithmetic)}</td>"
        f"<td>{cell.stop}</td><td class='{cell.state}'>{cell.state}</td>"
        f"<td>{_end(cell.stop_token, len(cell.tokens))}</td>"
        f"<td class='number'>{'' if cell.repetition.onset is None else cell.repetition.onset}</td>"
        f"<td class='number'>{cell.first_margin:.4g}</td><td class='number'>{cell.least_margin:.4g}</td>"
        f"<td><code>{escape(cell.text)}</code></td></tr>"
        for cell in report.cells.values()
    )
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.side)}</td>"
        f"<td>{escape(f.message)}</td></tr>"
        for f in report.findings
    )
    shared = "".join(f"<p>{count} runs shared with {escape(proof)}.</p>" for proof, count in report.sharing().items())
    head = [
        "side",
        "prompt",
        "wrap",
        "arithmetic",
        "stop",
        "state",
        "ends",
        "repeats from",
        "margin 1st",
        "least",
        "text",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>aprjax chatml: {report.verdict}</title><style>{_STYLE}</style></head><body>"
        "<h1>Why does ChatML go bad?</h1>"
        f"{_table(['side', 'file', 'format', 'declared stop tokens', 'sha256'], sides)}"
        f"<p>{escape(factorial.facts.files_sentence)} {report.computed} runs of {factorial.max_new_tokens} tokens on "
        f"{escape(factorial.backend)}.</p>{shared}{summary_html(report)}"
        f"<h2>Findings</h2>{_table(['severity', 'id', 'side', 'message'], findings)}"
        f"<h2>Cells</h2>{_table(head, cells)}</body></html>\n"
    )


def _end(stop_token: int | None, count: int) -> str:
    return f"{count} tokens, budget" if stop_token is None else f"{count} tokens, then {stop_token}"


def _table(head: list[str], rows: str) -> str:
    """A table that scrolls sideways on a narrow screen; `rows` are ready-made."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{rows}</table></div>'
