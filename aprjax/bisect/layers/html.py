"""The report folder: one self-contained page, the plots as PNG files, and the JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from aprjax.bisect.layers.plots import save_plot
from aprjax.bisect.page import number, number_cells, page, table, write_folder, write_picture
from aprjax.bisect.report import LayersReport
from aprjax.qwen2.stages import OUTSIDE

# Rows of the table of largest local differences.
_ROWS = 12


def write_report(reports: list[LayersReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `layers.json` and a plot per prompt into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "Heat maps of relative L2 by layer and stage, and the std ratio by layer"
    pictures = [
        write_picture(
            folder / f"layers-{report.prompt.name}.png", lambda stream, report=report: save_plot(report, stream), about
        )
        for report in reports
    ]
    return write_folder(folder, "layers", document, _page(reports, pictures))


def summary_html(report: LayersReport) -> str:
    """Verdict, cause and the largest local differences, as an HTML fragment (used by notebooks)."""
    return f"<h2>{_heading(report)}</h2><p>{escape(report.reason)}</p>{_next(report)}{_top_table(report)}"


def _page(reports: list[LayersReport], pictures: list[str]) -> str:
    first = reports[0]
    sections = [
        f"<section>{summary_html(report)}{picture}{_margins_table(report)}</section>"
        for report, picture in zip(reports, pictures, strict=True)
    ]
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f"<td>{escape(side.arithmetic)}</td><td><code>{side.sha256}</code></td></tr>"
        for name, side in first.sides.items()
    )
    return page(
        f"aprjax layers: {first.verdict}",
        "<h1>Where do these two models part?</h1>"
        f"{table(['side', 'file', 'format', 'arithmetic', 'sha256'], sides)}"
        f"{''.join(sections)}<h2>Findings</h2>{_findings_table(reports)}",
    )


def _heading(report: LayersReport) -> str:
    first = report.first_divergence
    place = "" if first is None else f" at {'' if first.layer == OUTSIDE else f'layer {first.layer}, '}{first.stage}"
    verdict = escape(str(report.verdict))
    return f'{escape(report.prompt.name)}: <span class="{verdict}">{verdict}{escape(place)}</span>'


def _next(report: LayersReport) -> str:
    first = report.first_divergence
    return f"<p><strong>Next:</strong> {escape(first.next_step)}</p>" if first is not None and first.next_step else ""


def _top_table(report: LayersReport) -> str:
    rows = "".join(
        f'<tr><td class="number">{row["layer"]}</td><td>{row["stage"]}</td>'
        + number_cells(row[key] for key in ("local_rel_l2", "tolerance", "rel_l2", "cosine", "std_ratio", "max_abs"))
        + "</tr>"
        for row in report.top(_ROWS)
        if row["local_rel_l2"]
    )
    if not rows:
        return "<p>Every stage is bit-identical given the same inputs.</p>" if report.layers else ""
    head = ["layer", "stage", "local rel L2", "tolerance", "rel L2", "cosine", "std ratio", "max |Δ|"]
    return table(head, rows, numbers=True)


def _margins_table(report: LayersReport) -> str:
    flips = [m for m in report.margins if m.flip]
    if not flips:
        return f"<p>No flip in {len(report.margins)} positions.</p>" if report.margins else ""
    rows = "".join(
        f'<tr><td class="number">{m.position}</td><td class="number">{m.ref.top1}</td>'
        f'<td class="number">{number(m.ref.margin)}</td><td class="number">{m.model.top1}</td>'
        f'<td class="number">{number(m.model.margin)}</td><td class="number">{number(m.gap)}</td>'
        f'<td class="number">{number(m.kl)}</td></tr>'
        for m in flips[:50]
    )
    head = ["position", "ref top-1", "ref margin", "model top-1", "model margin", "gap", "KL"]
    return f"<h3>{len(flips)} flips in {len(report.margins)} positions</h3>{table(head, rows, numbers=True)}"


def _findings_table(reports: list[LayersReport]) -> str:
    findings = dict.fromkeys(f for report in reports for f in report.findings)
    rows = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.side)}</td>"
        f"<td><code>{escape(f.tensor or '')}</code></td><td>{escape(f.message)}</td></tr>"
        for f in findings
    )
    return table(["severity", "id", "side", "tensor", "message"], rows)
