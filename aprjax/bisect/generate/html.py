"""The report folder of `generate`: one self-contained page with both texts and the margins, and the JSON."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from aprjax.bisect.generate.render import visible, work
from aprjax.bisect.generate.report import FirstDifference, GenerateReport, Kind
from aprjax.checkpoint.atomic import atomic_file

_STYLE = """
:root{color-scheme:light dark;--ok:#1a7f37;--bad:#cf222e;--warn:#9a6700;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}
.divergence{color:var(--bad)}.agree{color:var(--ok)}.near-tie,.unmeasured{color:var(--warn)}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}img{max-width:100%;height:auto;background:#fff;border-radius:6px}
code{font-size:.85em;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.two>div{border-top:3px solid var(--line)}
@media(max-width:40rem){.two{grid-template-columns:1fr}}
"""


def write_report(reports: list[GenerateReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `generate.json` and a plot per prompt into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for report in reports:
        picture = margins_plot(report)
        with atomic_file(folder / f"generate-{report.prompt.name}.png") as stream:
            stream.write(picture)
        pictures.append(picture)
    with atomic_file(folder / "generate.json") as stream:
        stream.write(json.dumps(document, indent=1, allow_nan=False).encode())
    page = folder / "index.html"
    with atomic_file(page) as stream:
        stream.write(_page(reports, pictures).encode())
    return page


def summary_html(report: GenerateReport) -> str:
    """Verdict, texts and the first difference, as an HTML fragment (used by notebooks)."""
    verdict = escape(str(report.verdict))
    first = report.first_difference
    place = "" if first is None else f" at new token {first.step + 1}"
    texts = ""
    if report.common_text is not None:
        sides = "".join(
            f"<div><strong>{name}</strong><pre>{escape(visible(report.continuations[name].rest or ''))}</pre></div>"
            for name in ("ref", "model")
        )
        texts = f'<pre>{escape(visible(report.common_text))}</pre><div class="two">{sides}</div>'
    following = f"<p><strong>Next:</strong> {escape(report.next_step)}</p>" if report.next_step else ""
    passes = "".join(
        f"<tr><td>{name}</td><td>{len(side.tokens)}</td><td>{escape(str(side.stop))}</td>"
        f"<td>{escape(work(side.passes))}</td></tr>"
        for name, side in report.continuations.items()
    )
    return (
        f'<h2>{escape(report.prompt.name)}: <span class="{verdict}">{verdict}{place}</span></h2>'
        f"<p>{escape(report.reason)}</p>{following}{_views(first)}{texts}"
        f"{_table(['side', 'new tokens', 'ended by', 'computed'], passes)}"
    )


def margins_plot(report: GenerateReport) -> bytes:
    """Both sides' margins at every step of the common part, the noise's reach, and where they part; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, name, style in (("ref_margin", "reference", "o-"), ("model_margin", "model", ".--")):
        points = [(row["step"] + 1, row[key]) for row in report.rows() if row[key] is not None and row[key] > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
    if report.noise is not None and report.noise["near_tie_gap"] > 0:
        axes.axhline(report.noise["near_tie_gap"], color="#9a6700", linestyle=":", label="reach of the noise")
    if report.first_difference is not None:
        axes.axvline(report.first_difference.step + 1, color="#cf222e", linewidth=1, label="first difference")
    axes.set(xlabel="new token", ylabel="margin (logits)", title=f"{report.prompt.name}: {report.verdict}")
    if report.smallest_margin is not None:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, format="png")
    pyplot.close(figure)
    return stream.getvalue()


def _page(reports: list[GenerateReport], pictures: list[bytes]) -> str:
    sections = []
    for report, picture in zip(reports, pictures, strict=True):
        data = base64.b64encode(picture).decode()
        sections.append(
            f'<section>{summary_html(report)}<p><img alt="Margins of both sides by step" '
            f'src="data:image/png;base64,{data}"></p></section>'
        )
    first = reports[0]
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f"<td>{escape(side.arithmetic)}</td><td><code>{side.sha256}</code></td></tr>"
        for name, side in first.sides.items()
    )
    found = dict.fromkeys(finding for report in reports for finding in report.findings)
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.message)}</td></tr>" for f in found
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>aprjax generate: {escape(str(first.verdict))}</title><style>{_STYLE}</style></head><body>"
        "<h1>Do these two models say the same?</h1>"
        f"{_table(['side', 'file', 'format', 'arithmetic', 'sha256'], sides)}<p>{escape(first.shared)}</p>"
        f"{''.join(sections)}<h2>Findings</h2>{_table(['severity', 'id', 'message'], findings)}</body></html>\n"
    )


def _views(first: FirstDifference | None) -> str:
    if first is None or first.kind is not Kind.TOKEN:
        return ""
    pieces = first.pieces or ("", "")
    rows = []
    for name, view, piece in (("ref", first.ref, pieces[1]), ("model", first.model, pieces[0])):
        if view.margin is None or view.gap is None:
            continue
        rows.append(
            f"<tr><td>{name}</td><td><code>{view.margin.top1} {escape(f'“{piece}”')}</code></td>"
            f'<td class="number">{view.margin.margin:.4g}</td><td class="number">{view.rank}</td>'
            f'<td class="number">{view.gap:.4g}</td></tr>'
        )
    return _table(["side", "chooses", "margin", "rank of the other's choice", "gap"], "".join(rows))


def _table(head: list[str], rows: str) -> str:
    if not rows:
        return "<p>None.</p>"
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{rows}</table></div>'
