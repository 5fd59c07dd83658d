"""The margin strip: the reference's margin at every position as a bar, the token below it, flips marked."""

from __future__ import annotations

from typing import Any, BinaryIO

from aprjax.bisect.figure import new_figure, save_figure
from aprjax.bisect.margins.report import MarginsReport, TokenMargin
from aprjax.bisect.report import Verdict

# Tokens of one line of the strip: their texts stay readable.
_LINE = 64
# Fewer leave room for the legend.
_LEAST = 32
# Lines drawn; more positions are in the JSON.
_LINES = 10
_COLOURS = {
    Verdict.AGREE: "#9bbcd8",
    Verdict.NEAR_TIE: "#e6a700",
    Verdict.DIVERGENCE: "#cf222e",
    Verdict.UNMEASURED: "#8250df",
}
# Characters of a token's text under its bar.
_TEXT = 12
_RISK = "#1f6fb2"


def save_strip(report: MarginsReport, target: BinaryIO) -> None:
    """Writes the strip as PNG."""
    save_figure(plot_strip(report), target)


def plot_strip(report: MarginsReport) -> Any:
    """A matplotlib figure of the strip: `_LINE` positions a line, on a logarithmic scale of logits."""
    shown = report.rows[: _LINE * _LINES]
    lines = [shown[begin : begin + _LINE] for begin in range(0, len(shown), _LINE)]
    across = min(_LINE, max(len(shown), _LEAST))
    figure = new_figure(1.5 + 13.5 * across / _LINE, 0.6 + 2.3 * len(lines))
    found = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    margins = [row.ref.margin for row in report.rows if row.ref is not None and row.ref.margin > 0]
    gaps = [row.widest_gap for row in report.rows if row.flip and row.widest_gap]
    reach = next((bound.reach for bound in report.bounds if bound.reach), None)
    lowest = min([*margins, *gaps, *([reach] if reach else [1.0])]) / 2
    highest = max([*margins, *gaps, 1.0]) * 1.5
    for axes, rows in zip(found, lines, strict=True):
        _line(axes, rows, lowest)
        for bound, style in zip(report.bounds, ("-", "--"), strict=False):
            if bound.reach:
                label = f"reach of {bound.source}: {bound.reach:.2g} logits"
                axes.axhline(bound.reach, color="#333", linestyle=style, linewidth=1, label=label)
        axes.set_yscale("log")
        axes.set_ylim(lowest, highest)
        axes.set_xlim(-1, across)
        axes.set_ylabel("margin (logits)", fontsize=8)
    _legend(figure, found[0])
    cut = f", the first {len(shown)} of {len(report.rows)}" if len(shown) < len(report.rows) else ""
    figure.suptitle(
        f"{report.fed.name}: {report.verdict}; the reference's margin of the next choice after each token{cut}",
        fontsize=11,
    )
    return figure


def _line(axes: Any, rows: tuple[TokenMargin, ...], lowest: float) -> None:
    for place, row in enumerate(rows):
        if row.ref is None:
            axes.plot([place], [lowest * 2], "x", color=_COLOURS[row.verdict])
            continue
        agreed = row.verdict is Verdict.AGREE
        colour = _RISK if agreed and row.at_risk else _COLOURS[row.verdict]
        # An exact tie has no height on a logarithmic scale: it keeps a foot.
        axes.bar(place, max(row.ref.margin, lowest * 1.2), color=colour, width=0.8)
        if row.flip and row.widest_gap is not None:
            axes.plot([place], [max(row.widest_gap, lowest * 1.2)], "v", color=_COLOURS[row.verdict], markersize=6)
    texts = [_readable(row.text) for row in rows]
    axes.set_xticks(range(len(rows)), texts, rotation=90, fontsize=6, family="monospace")


def _readable(text: str) -> str:
    """Printable ASCII: the plot's font has no other signs, and `$` would begin a formula."""
    plain = text.encode("ascii", "backslashreplace").decode().replace("$", r"\$")
    return plain if len(plain) <= _TEXT else plain[: _TEXT - 1] + "…"


def _legend(figure: Any, axes: Any) -> None:
    from matplotlib.patches import Patch

    lines, labels = axes.get_legend_handles_labels()
    patches = [
        Patch(color=_COLOURS[Verdict.AGREE], label="agree"),
        Patch(color=_RISK, label="agree, at risk"),
        Patch(color=_COLOURS[Verdict.NEAR_TIE], label="near-tie"),
        Patch(color=_COLOURS[Verdict.DIVERGENCE], label="divergence"),
    ]
    texts = [*(patch.get_label() for patch in patches), *labels]
    figure.legend(
        handles=[*patches, *lines], labels=texts, fontsize=7, ncols=3, loc="outside lower center", frameon=False
    )
