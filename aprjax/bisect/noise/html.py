"""The report folder of `noise`: a page, what every change moves by stage as a plot, and the JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import BinaryIO

from aprjax.bisect.noise.report import ChangeReport, NoiseReport
from aprjax.bisect.page import number, number_cells, page, table, write_folder, write_picture
from aprjax.qwen2.stages import Stage


def write_report(report: NoiseReport, folder: Path) -> Path:
    """Writes `index.html`, `noise.json` and `noise.png` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "The largest relative L2 of every stage over the layers, a line per change"
    picture = write_picture(folder / "noise.png", lambda stream: save_plot(report, stream), about)
    return write_folder(folder, "noise", report.to_json(), _page(report, picture))


def _page(report: NoiseReport, picture: str) -> str:
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.message)}</td></tr>"
        for f in report.findings
    )
    return page(
        "aprjax noise",
        "<h1>How far is this file from itself?</h1>"
        f"<p><code>{escape(report.path)}</code><br><code>{report.sha256}</code><br>"
        f"{escape(report.arithmetic)} arithmetic, {len(report.tokens)} tokens</p>"
        f"<h2>At the logits</h2>{_logits(report)}{picture}<h2>By stage</h2>"
        "<p>Relative L2, the median and the largest over the layers.</p>"
        + "".join(f"<h3>{escape(change.name)}</h3>{_stages(change)}" for change in report.changes)
        + (f"<h2>Findings</h2>{table(['severity', 'id', 'message'], findings)}" if findings else ""),
    )


def _logits(report: NoiseReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.name)}</td>{number_cells([c.logits_rel_l2, c.rms_delta, c.max_delta, c.max_kl])}"
        f'<td class="number">{c.flips} of {c.positions}</td></tr>'
        for c in report.changes
    )
    return table(["change", "rel L2", "rms Δ", "max |Δ|", "max KL", "flips"], rows)


def _stages(change: ChangeReport) -> str:
    rows = "".join(
        f'<tr><td>{escape(str(stage))}</td><td class="number">{number(median)}</td>'
        f'<td class="number">{number(most)}</td></tr>'
        for stage, (median, most) in change.stages.items()
    )
    return table(["stage", "median", "largest"], rows)


def save_plot(report: NoiseReport, target: BinaryIO) -> None:
    """Writes the plot as PNG: by stage, in execution order, the largest distance over the layers."""
    from matplotlib.figure import Figure

    stages = list(Stage)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for change in report.changes:
        # On a logarithmic axis zero has no place: such stages, bit-identical, leave a gap.
        places = [i for i, stage in enumerate(stages) if change.stages.get(stage, (0.0, 0.0))[1] > 0]
        axes.plot(places, [change.stages[stages[i]][1] for i in places], "o-", markersize=3, label=change.name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(stages)), [str(stage) for stage in stages], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("largest relative L2 over the layers")
    axes.set_title(f"{Path(report.path).name}, {report.arithmetic}, {len(report.tokens)} tokens", fontsize=11)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=110, format="png")
