"""The `margins` report for a terminal of 80 columns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aprjax.bisect.margins.report import Distribution, FlipBound, MarginsReport, TokenMargin
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.report import Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {
    Verdict.AGREE: "green",
    Verdict.NEAR_TIE: "yellow",
    Verdict.DIVERGENCE: "red",
    Verdict.UNMEASURED: "magenta",
}
# Rows of the table of positions; the JSON has all of them.
_MOST_ROWS = 16
# Findings shown in full.
_MOST_FINDINGS = 8
# Columns that a token's text may take.
_TOKEN_WIDTH = 14


def render(reports: list[MarginsReport], console: Console) -> None:
    """What was compared, then for each prompt the positions that matter, the summary and the verdict."""
    from rich.markup import escape

    for name, side in reports[0].sides.items():
        console.print(f"{name:6} {escape(os.path.basename(side.path))}", soft_wrap=True)
        console.print(f"       [dim]{side.format}, {escape(side.arithmetic)} arithmetic, sha256 {side.sha256[:16]}…[/]")
    _findings(reports, console)
    for report in reports:
        _one(report, console)


def _findings(reports: list[MarginsReport], console: Console) -> None:
    from rich.markup import escape

    order = {"error": 0, "warning": 1, "info": 2}
    findings = sorted(dict.fromkeys(f for r in reports for f in r.findings), key=lambda f: order[f.severity])
    for finding in findings[:_MOST_FINDINGS]:
        colour = {"error": "red", "warning": "yellow", "info": "dim"}[finding.severity]
        side = f"{finding.side}: " if finding.side not in ("", "both") else ""
        console.print(f"[{colour}]{finding.severity:7}[/] {escape(side + finding.message)} [dim]({finding.id})[/]")
    if len(findings) > _MOST_FINDINGS:
        console.print(f"[dim]… and {len(findings) - _MOST_FINDINGS} more findings (all are in the JSON)[/]")


def _one(report: MarginsReport, console: Console) -> None:
    from rich.markup import escape

    fed = report.fed
    console.print()
    more = f" and {len(fed.continuation)} of its continuation ({fed.source})" if fed.continuation else ""
    pieces = f", in pieces of {fed.context}" if fed.context is not None else ""
    console.print(f"[bold]{escape(fed.name)}[/]: {len(fed.prompt)} tokens{more}{pieces}, {len(report.rows)} compared")
    _noise(report, console)
    console.print(_positions(report))
    if len(report.rows) > _MOST_ROWS:
        console.print(
            f"[dim]… of {len(report.rows)} positions: flips, then the smallest margins (all are in the JSON)[/]"
        )
    _summary(report, console)
    for bound in report.bounds:
        _bound(bound, len(report.rows), console)
    console.print(f"[bold {STYLES[report.verdict]}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def _noise(report: MarginsReport, console: Console) -> None:
    from rich.markup import escape

    noise = report.noise
    if noise is None:
        return
    console.print(
        f"noise   sigma {noise.sigma:.3g} logits: a gap of up to {NEAR_TIE_SIGMAS:.1f} sigma = "
        f"{noise.near_tie_gap:.3g} logits is a near-tie"
    )
    for change in noise.changes:
        console.print(
            f"        [dim]{change.sigma:.2e} {escape(change.side)}, {escape(change.arithmetic)}: "
            f"{escape(change.change)} ({change.flips} of {change.positions} flip)[/]"
        )


def _positions(report: MarginsReport) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("at", justify="right")
    # Where a terminal is too narrow, texts are cut and numbers stay whole.
    for heading in ("fed", "ref", "model"):
        table.add_column(heading, overflow="ellipsis", min_width=4)
    for heading in ("margin", "in σ", "gap", "in σ", "rank", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    pieces = report.fed.context is not None
    for row in sorted(report.top(_MOST_ROWS), key=lambda row: (row.chunk, row.position)):
        style = STYLES[row.verdict] if row.verdict is not Verdict.AGREE else None
        table.add_row(
            f"{row.chunk + 1}:{row.position}" if pieces else str(row.position),
            *(escape(_cut(text)) for text in (row.text, row.ref_text, row.model_text)),
            _number(row.ref.margin if row.ref else None),
            _multiple(row.margin_sigmas),
            _number(row.widest_gap) if row.flip else "",
            _sigmas(row),
            "–" if row.rank is None else str(row.rank),
            "–" if row.kl is None else ("0" if row.kl == 0 else f"{row.kl:.1e}"),
            "" if row.verdict is Verdict.AGREE else str(row.verdict),
            style=style,
        )
    return table


def _sigmas(row: TokenMargin) -> str:
    if not row.flip:
        return ""
    return "∞" if row.gap_sigmas is None and row.margin_sigmas is None else _multiple(row.gap_sigmas)


def _cut(text: str) -> str:
    return text if len(text) <= _TOKEN_WIDTH else text[: _TOKEN_WIDTH - 1] + "…"


def _summary(report: MarginsReport, console: Console) -> None:
    from rich import box
    from rich.table import Table

    summary = report.summary
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("mean", "median", "99 %", "max"):
        table.add_column(heading, justify="right")
    for name, found in (
        ("KL(ref‖model), nats", summary.kl),
        ("Δp of the next token", summary.probability_change),
        ("max |Δlogit|", summary.max_delta),
    ):
        if found is not None:
            table.add_row(name, *_cells(found))
    console.print(table)
    if summary.same_top is not None:
        error = "" if summary.same_top_error is None else f" ± {summary.same_top_error:.2%}"
        console.print(f"same top-1   {summary.same_top:.2%}{error} of {summary.positions}")
    if summary.model_perplexity is not None and summary.ref_perplexity is not None:
        ratio = "" if summary.log_ratio is None else f", ln of their ratio {summary.log_ratio:+.2e}"
        error = "" if summary.log_ratio_error is None else f" ± {summary.log_ratio_error:.1e}"
        console.print(
            f"perplexity   {summary.model_perplexity:.6g} (model) and {summary.ref_perplexity:.6g} (ref){ratio}{error}"
        )


def _cells(found: Distribution) -> list[str]:
    return [
        "0" if value == 0 else f"{value:.2e}" for value in (found.mean, found.median, found.percent_99, found.maximum)
    ]


def _bound(bound: FlipBound, positions: int, console: Console) -> None:
    if bound.reach is None:
        return
    expected = "" if bound.expected is None else f", {bound.expected:.2g} flips expected"
    came = f"{bound.caught} of the {bound.flips} real ones were on the list" if bound.flips else "there was none"
    console.print(
        f"at risk      {len(bound.listed)} of {positions} positions by {bound.source} "
        f"(reach {bound.reach:.3g} logits){expected}; {came}"
    )


def _multiple(sigmas: float | None) -> str:
    # Beyond that many sigma nobody counts them: digits would only widen the table.
    return f"{sigmas:.0e}" if sigmas is not None and sigmas >= 1e4 else _number(sigmas)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
