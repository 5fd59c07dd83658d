"""A check as an HTML page, and as the fragment that notebooks show."""

from __future__ import annotations

from html import escape
from pathlib import Path

from aprjax.contracts.types import CheckReport, Status, TestOutcome

# The page's classes: what a pass, a failure and an unmeasured test look like.
_CLASS = {Status.PASS: "agree", Status.FAIL: "divergence", Status.UNMEASURED: "unmeasured"}


def write_report(report: CheckReport, folder: Path) -> Path:
    """Writes `index.html`, `check.json` and the raw outputs into `folder`; returns the page's path."""
    from aprjax.bisect.page import page, table, write_folder
    from aprjax.checkpoint.atomic import atomic_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in report.artifacts.items():
        with atomic_file(folder / name) as stream:
            stream.write(text.encode("utf-8", "replace"))
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f"<td>{escape(side.arithmetic)}</td><td><code>{side.sha256 or ''}</code></td></tr>"
        for name, side in report.sides.items()
    )
    body = (
        "<h1>Do these two models keep the contracts?</h1>"
        f"{table(['side', 'file', 'format', 'arithmetic', 'sha256'], sides)}{summary_html(report)}"
        + "".join(_contract(report, contract.id) for contract in report.contracts)
        + f"<p><code>{escape(report.command)}</code></p>"
    )
    return write_folder(folder, "check", report.to_json(), page("aprjax check", body))


def summary_html(report: CheckReport) -> str:
    """The counts, and what failed, as an HTML fragment."""
    counts = ", ".join(f'<span class="{_CLASS[s]}">{report.count(s)} {s}</span>' for s in Status)
    rows = "".join(_row(outcome) for outcome in report.outcomes if outcome.status is Status.FAIL)
    failed = f"<table>{rows}</table>" if rows else ""
    return f"<p>{counts}; an unmeasured test has not passed.</p>{failed}"


def _contract(report: CheckReport, contract_id: str) -> str:
    from aprjax.bisect.page import table

    rows = "".join(_row(outcome) for outcome in report.outcomes if outcome.contract_id == contract_id)
    head = ["test", "status", "reason", "bounds and their basis"]
    return f"<h2>{escape(contract_id)}</h2>{table(head, rows)}" if rows else ""


def _row(outcome: TestOutcome) -> str:
    bounds = "<br>".join(f"{escape(str(t))}: {escape(t.basis)}" for t in outcome.thresholds)
    return (
        f'<tr><td><code>{escape(outcome.test_id)}</code></td><td class="{_CLASS[outcome.status]}">{outcome.status}</td>'
        f"<td>{escape(outcome.rule)}<br>{escape(outcome.reason)}</td><td>{bounds}</td></tr>"
    )
