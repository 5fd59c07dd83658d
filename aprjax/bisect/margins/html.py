"""The report folder of `margins`: a page with a strip of tokens by margin, the plots as PNG files, and the JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from aprjax.bisect.margins.plot import save_strip
from aprjax.bisect.margins.report import Distribution, MarginsReport, TokenMargin
from aprjax.bisect.page import number, number_cells, page, table, write_folder, write_picture
from aprjax.bisect.report import Verdict

# Rows of the table of positions that matter.
_ROWS = 40
# Tokens of the strip: beyond this a page becomes slow to scroll; the JSON has all.
_STRIP = 4000
_STRIP_STYLE = (
    "<style>.strip{line-height:2;overflow-wrap:anywhere}.strip span{padding:.1em .15em;border-radius:3px;"
    "white-space:pre-wrap;color:#111;margin:0 1px;display:inline-block}"
    ".strip .near-tie{outline:2px solid var(--warn)}.strip .divergence{outline:3px solid var(--bad)}"
    ".strip .risk{border-bottom:3px dotted #111}.key span{padding:0 .6em;color:#111;border-radius:3px}</style>"
)
# Colours by the reference's margin in sigma, from undecided to sure; light enough for dark text.
_COLOURS = ((3.0 * 2**0.5, "#ffb3a7"), (15.0, "#ffd8a8"), (50.0, "#fff3bf"), (float("inf"), "#d3f9d8"))


def write_report(reports: list[MarginsReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `margins.json` and a plot per prompt into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "The reference's margin at every position, with the reach of noise and drift, flips marked"
    sections = []
    for report in reports:
        picture = write_picture(
            folder / f"margins-{report.fed.name}.png", lambda stream, report=report: save_strip(report, stream), about
        )
        sections.append(f"<section>{summary_html(report)}{picture}</section>")
    sides = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(side.path)}</code></td><td>{escape(side.format)}</td>"
        f"<td>{escape(side.arithmetic)}</td><td><code>{side.sha256}</code></td></tr>"
        for name, side in reports[0].sides.items()
    )
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.side)}</td>"
        f"<td>{escape(f.message)}</td></tr>"
        for f in dict.fromkeys(f for report in reports for f in report.findings)
    )
    body = (
        "<h1>How safe is each choice of the next token?</h1>"
        + table(["side", "file", "format", "arithmetic", "sha256"], sides)
        + "".join(sections)
        + "<h2>Findings</h2>"
        + table(["severity", "id", "side", "message"], findings)
    )
    return write_folder(folder, "margins", document, page("aprjax margins", body))


def summary_html(report: MarginsReport) -> str:
    """Verdict, strip, positions that matter and summary, as an HTML fragment (used by notebooks)."""
    verdict = escape(str(report.verdict))
    return (
        f'<h2>{escape(report.fed.name)}: <span class="{verdict}">{verdict}</span></h2>'
        f"<p>{escape(report.reason)}</p>{_noise(report)}{_strip(report)}{_summary(report)}{_positions(report)}"
    )


def _noise(report: MarginsReport) -> str:
    noise = report.noise
    if noise is None:
        return "<p>The noise floor was not measured.</p>"
    rows = "".join(
        f"<tr><td>{escape(c.side)}</td><td>{escape(c.arithmetic)}</td><td>{escape(c.change)}</td>"
        f"{number_cells([c.sigma, c.sigma_vocabulary, c.sigma_top2, c.largest_gap_change])}"
        f'<td class="number">{c.flips} of {c.positions}</td></tr>'
        for c in noise.changes
    )
    head = ["side", "arithmetic", "change", "σ", "σ, all tokens", "σ, top 2", "largest change of the gap", "flips"]
    return (
        f"<p>σ = {number(noise.sigma)} logits ({escape(noise.method)}); a gap of up to {number(noise.near_tie_gap)} "
        f"logits is a near-tie.</p>{table(head, rows)}"
    )


def _strip(report: MarginsReport) -> str:
    """The fed tokens, each coloured by how sure the reference is of the *next* one."""
    if report.noise is None or report.noise.sigma == 0:
        return ""
    shown = report.rows[:_STRIP]
    spans = "".join(_span(row) for row in shown)
    bounds = [
        f'<span style="background:{colour}">{"more" if bound == float("inf") else f"≤ {bound:.3g} σ"}</span>'
        for bound, colour in _COLOURS
    ]
    more = f"<p>… and {len(report.rows) - len(shown)} more</p>" if len(report.rows) > len(shown) else ""
    return (
        f"{_STRIP_STYLE}<p class='key'>Margin of the reference's next choice after each token: {' '.join(bounds)}; "
        f"dotted: listed as at risk; outlined: a flip.</p><p class='strip'>{spans}</p>{more}"
    )


def _span(row: TokenMargin) -> str:
    margin = row.margin_sigmas
    colour = "#ddd" if margin is None else next(colour for bound, colour in _COLOURS if margin <= bound)
    classes = " ".join(
        name for name, on in (("risk", row.at_risk), (str(row.verdict), row.verdict is not Verdict.AGREE)) if on
    )
    said = f"ref {row.ref_text!r}, model {row.model_text!r}, margin {number(row.ref.margin if row.ref else None)}"
    title = escape(f"position {row.position}: {said}, KL {number(row.kl)}", quote=True)
    return f'<span class="{classes}" style="background:{colour}" title="{title}">{escape(row.text)}</span>'


def _summary(report: MarginsReport) -> str:
    summary = report.summary
    rows = "".join(
        f"<tr><td>{name}</td>{_cells(found)}</tr>"
        for name, found in (
            ("KL(ref‖model), nats", summary.kl),
            ("Δp of the next token", summary.probability_change),
            ("max |Δlogit|", summary.max_delta),
        )
        if found is not None
    )
    head = ["", "mean", "± error", "rms", "min", "1 %", "median", "95 %", "99 %", "99.9 %", "max"]
    bounds = "".join(
        f"<tr><td>{escape(b.source)}</td>{number_cells([b.reach, float(len(b.listed)), b.expected])}"
        f'<td class="number">{b.flips}</td><td class="number">{b.caught}</td></tr>'
        for b in report.bounds
    )
    same = "" if summary.same_top is None else f"Same top-1: {summary.same_top:.2%} of {summary.positions}. "
    perplexity = (
        f"Perplexity: {number(summary.model_perplexity)} (model), {number(summary.ref_perplexity)} (ref), "
        f"ln of their ratio {number(summary.log_ratio)} ± {number(summary.log_ratio_error)}."
        if summary.ref_perplexity is not None
        else ""
    )
    return f"<h3>Summary</h3>{table(head, rows)}<p>{same}{perplexity}</p><h3>Flips foreseen</h3>" + table(
        ["by the reach of", "reach, logits", "listed", "expected", "flips", "of them listed"], bounds
    )


def _cells(found: Distribution) -> str:
    return number_cells(
        [
            found.mean,
            found.error,
            found.rms,
            found.minimum,
            found.percent_1,
            found.median,
            found.percent_95,
            found.percent_99,
            found.percent_99_9,
            found.maximum,
        ]
    )


def _positions(report: MarginsReport) -> str:
    pieces = report.fed.context is not None
    rows = "".join(
        f'<tr><td class="number">{row.chunk + 1 if pieces else ""}{":" if pieces else ""}{row.position}</td>'
        f"<td><code>{escape(row.text)}</code></td>"
        f"<td><code>{escape(row.ref_text)}</code></td><td><code>{escape(row.model_text)}</code></td>"
        f"{number_cells([row.ref.margin if row.ref else None, row.margin_sigmas, row.widest_gap, row.gap_sigmas])}"
        f'<td class="number">{"–" if row.rank is None else row.rank}</td>{number_cells([row.kl, row.max_delta])}'
        f'<td class="{row.verdict}">{row.verdict}</td></tr>'
        for row in report.top(_ROWS)
    )
    head = ["at", "fed", "ref", "model", "margin", "in σ", "gap", "in σ", "rank", "KL", "max |Δ|", "verdict"]
    return f"<h3>Positions: flips first, then the smallest margins</h3>{table(head, rows)}"
