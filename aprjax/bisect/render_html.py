"""The report folder: one self-contained page, the plots as PNG files, and the JSON."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from aprjax.bisect.render_plots import save_plot
from aprjax.bisect.report import LayersReport
from aprjax.checkpoint.atomic import atomic_file
from aprjax.qwen2.stages import OUTSIDE

_STYLE = """
:root{color-scheme:light dark;--ok:#1a7f37;--bad:#cf222e;--warn:#9a6700;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}
.divergence{color:var(--bad)}.agree{color:var(--ok)}.near-tie,.unmeasured{color:var(--warn)}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}img{max-width:100%;height:auto;background:#fff;border-radius:6px}
code{font-size:.85em;overflow-wrap:anywhere}td code{display:inline-block;min-width:10rem}
"""
# Rows of the table of largest local differences.
_ROWS = 12


def write_report(reports: list[LayersReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `layers.json` and a plot per prompt into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for report in reports:
        picture = folder / f"layers-{report.prompt.name}.png"
        with atomic_file(picture) as stream:
            save_plot(report, stream)
        pictures.append(picture)
    _write(folder / "layers.json", json.dumps(document, indent=1, allow_nan=False))
    page = folder / "index.html"
    _write(page, _page(reports, pictures))
    return page


def summary_html(report: LayersReport) -> str:
    """Verdict, cause and the largest local differences, as an HTML fragment (used by notebooks)."""
    return f"<h2>{_heading(report)}</h2><p>{escape(report.reason)}</p>{_next(report)}{_top_table(report)}"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())


def _page(reports: list[LayersReport], pictures: list[Path]) -> str:
    first = reports[0]
    sections = []
    for report, picture in zip(reports, pictures, strict=True):
        data = base64.b64encode(picture.read_bytes()).decode()
        sections.append(
            f"<section>{summary_html(report)}"
            f'<p><img alt="Heat maps of relative L2 by layer and stage, and the std ratio by layer" '
            f'src="data:image/png;base64,{data}"></p>{_margins_table(report)}</section>'
        )
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f"<td>{escape(side.arithmetic)}</td><td><code>{side.sha256}</code></td></tr>"
        for name, side in first.sides.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>aprjax layers: {escape(str(first.verdict))}</title><style>{_STYLE}</style></head><body>"
        "<h1>Where do these two models part?</h1>"
        f"{_table(['side', 'file', 'format', 'arithmetic', 'sha256'], sides)}"
        f"{''.join(sections)}<h2>Findings</h2>{_findings_table(reports)}</body></html>\n"
    )


def _heading(report: LayersReport) -> str:
    first = report.first_divergence
    place = "" if first is None else f" at {'' if first.layer == OUTSIDE else f'layer {first.layer}, '}{first.stage}"
    verdict = escape(str(report.verdict))
    return f'{escape(report.prompt.name)}: <span class="{verdict}">{verdict}{escape(place)}</span>'


def _next(report: LayersReport) -> str:
    first = report.first_divergence
    return f"<p><strong>Next:</strong> {escape(first.next_step)}</p>" if first is not None and first.next_step else ""


def _table(head: list[str], rows: str, *, numbers: bool = False) -> str:
    """A table that scrolls sideways on a narrow screen; `rows` are ready-made."""
    kind = ' class="number"' if numbers else ""
    cells = "".join(f"<th{kind}>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{rows}</table></div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _top_table(report: LayersReport) -> str:
    rows = "".join(
        f'<tr><td class="number">{row["layer"]}</td><td>{row["stage"]}</td>'
        + "".join(
            f'<td class="number">{_number(row[key])}</td>'
            for key in ("local_rel_l2", "tolerance", "rel_l2", "cosine", "std_ratio", "max_abs")
        )
        + "</tr>"
        for row in report.top(_ROWS)
        if row["local_rel_l2"]
    )
    if not rows:
        return "<p>Every stage is bit-identical given the same inputs.</p>" if report.layers else ""
    head = ["layer", "stage", "local rel L2", "tolerance", "rel L2", "cosine", "std ratio", "max |Δ|"]
    return _table(head, rows, numbers=True)


def _margins_table(report: LayersReport) -> str:
    flips = [m for m in report.margins if m.flip]
    if not flips:
        return f"<p>No flip in {len(report.margins)} positions.</p>" if report.margins else ""
    rows = "".join(
        f'<tr><td class="number">{m.position}</td><td class="number">{m.ref.top1}</td>'
        f'<td class="number">{_number(m.ref.margin)}</td><td class="number">{m.model.top1}</td>'
        f'<td class="number">{_number(m.model.margin)}</td><td class="number">{_number(m.gap)}</td>'
        f'<td class="number">{_number(m.kl)}</td></tr>'
        for m in flips[:50]
    )
    head = ["position", "ref top-1", "ref margin", "model top-1", "model margin", "gap", "KL"]
    return f"<h3>{len(flips)} flips in {len(report.margins)} positions</h3>{_table(head, rows, numbers=True)}"


def _findings_table(reports: list[LayersReport]) -> str:
    findings = dict.fromkeys(f for report in reports for f in report.findings)
    rows = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.side)}</td>"
        f"<td><code>{escape(f.tensor or '')}</code></td><td>{escape(f.message)}</td></tr>"
        for f in findings
    )
    return _table(["severity", "id", "side", "tensor", "message"], rows)
