"""The report folder of `files`: one self-contained page and the JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path

from aprjax.bisect.files.report import FilesComparison
from aprjax.bisect.page import number, number_cells, page, table, write_folder

# Rows of the table of tensors: a screenful or two; the JSON has all.
_ROWS = 60


def write_report(report: FilesComparison, folder: Path) -> Path:
    """Writes `index.html` and `files.json` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f'<td class="number">{side.tensors}</td><td>{escape(_types(side.block_types))}</td>'
        f"<td><code>{side.sha256}</code></td></tr>"
        for name, side in report.sides.items()
    )
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.side)}</td>"
        f"<td><code>{escape(f.tensor or '')}</code></td><td>{escape(f.message)}</td></tr>"
        for f in report.findings
    )
    body = (
        "<h1>Do these two files hold the same model?</h1>"
        + table(["side", "file", "format", "tensors", "block types", "sha256"], sides)
        + summary_html(report)
        + "<h2>Findings</h2>"
        + table(["severity", "id", "side", "tensor", "message"], findings)
    )
    document = page(f"aprjax files: {report.verdict}", body)
    return write_folder(folder, "files", report.to_json(), document)


def _types(held: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, (count, _) in held.items())


def summary_html(report: FilesComparison) -> str:
    """Verdict, causes, differing keys and tensors, as an HTML fragment (used by notebooks)."""
    verdict = escape(str(report.verdict))
    causes = "".join(
        f"<tr><td><code>{escape(cause.id or 'unexplained')}</code></td><td class='number'>{len(cause.tensors)}</td>"
        f"<td>{escape(cause.sentence)}</td><td class='number'>{number(cause.residual)}</td>"
        f"<td>{escape(cause.basis)}</td><td>{escape(cause.next_step)}</td></tr>"
        for cause in report.causes
    )
    keys = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(repr(a))}</td><td>{escape(repr(b))}</td></tr>"
        for key, (a, b) in report.files.config.items()
    )
    tensors = "".join(
        f"<tr><td><code>{escape(row['tensor'])}</code></td><td>{escape(str(row['model_type']))}</td>"
        f"<td>{escape(str(row['ref_type']))}</td>"
        + number_cells([row["rel_l2"], row["cosine"], row["max_abs"], float(row["rows"])])
        + f"<td>{escape(row['explanation'] or 'nothing')}</td>{number_cells([row['residual']])}</tr>"
        for row in report.top(_ROWS)
    )
    parts = [f'<h2 class="{verdict}">{verdict}</h2><p>{escape(report.reason)}</p>']
    if causes:
        parts.append(table(["explained by", "tensors", "what happened", "left", "measured on", "next"], causes))
    if keys:
        parts.append("<h3>Config</h3>" + table(["key", "model", "ref"], keys))
    if tensors:
        head = ["tensor", "model", "ref", "rel L2", "cosine", "max |Δ|", "rows", "explained by", "left"]
        parts.append("<h3>Tensors that differ most</h3>" + table(head, tensors))
    return "".join(parts)
