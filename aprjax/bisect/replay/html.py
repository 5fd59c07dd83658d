"""The report folder of `replay`: a page, the heat map of its nodes, and the JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aprjax.bisect.page import number_cells, page, table, write_folder, write_picture
from aprjax.bisect.replay.report import NodeReport, NodeVerdict, ReplayReport, place
from aprjax.qwen2.stages import OUTSIDE, Stage

# Colours begin at float32's unit roundoff: a smaller difference is none.
_FLOOR = 2.0**-24


def write_report(report: ReplayReport, folder: Path) -> Path:
    """Writes `index.html`, `replay.json` and `replay.png` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "Heat map of every node's distance from what the file gives, by layer and stage"
    picture = write_picture(folder / "replay.png", lambda stream: save_plot(report, stream), about)
    return write_folder(folder, "replay", report.to_json(), _page(report, picture))


def _page(report: ReplayReport, picture: str) -> str:
    trace, file = report.trace, report.file
    sides = "".join(
        f"<tr><td>{name}</td><td><code>{escape(str(side['path']))}</code></td><td>{escape(how)}</td>"
        f"<td><code>{escape(str(side['sha256']))}</code></td></tr>"
        for name, side, how in (("trace", trace, trace["arithmetic"]), ("file", file, ", ".join(report.arithmetics)))
    )
    findings = "".join(
        f"<tr><td>{f.severity}</td><td><code>{escape(f.id)}</code></td><td>{escape(f.message)}</td></tr>"
        for f in report.findings
    )
    return page(
        f"aprjax replay: {report.verdict}",
        "<h1>Which nodes of this trace does the file explain?</h1>"
        f"{table(['', 'path', 'arithmetic', 'sha256'], sides)}"
        f'<h2 class="{report.verdict}">{report.verdict}</h2>{report._repr_html_()}{picture}'
        f"<h2>By stage</h2>{_stages(report)}<h2>Farthest nodes</h2>{_farthest(report)}"
        + (f"<h2>Findings</h2>{table(['severity', 'id', 'message'], findings)}" if findings else ""),
    )


def _stages(report: ReplayReport) -> str:
    rows = []
    for stage in dict.fromkeys(node.stage for node in report.nodes):
        nodes = [node for node in report.nodes if node.stage is stage]
        counts = [sum(node.verdict is verdict for node in nodes) for verdict in NodeVerdict]
        worst = max((node.worst_row for node in nodes if node.worst_row is not None), default=None)
        unequal = [node.mismatches for node in nodes if node.mismatches is not None]
        cells = number_cells([*counts, sum(unequal) if unequal else None, worst])
        rows.append(f"<tr><td>{escape(str(stage))}</td>{cells}</tr>")
    return table(["stage", *map(str, NodeVerdict), "unequal values", "worst position"], "".join(rows), numbers=True)


def _farthest(report: ReplayReport) -> str:
    measured = [node for node in report.nodes if node.mismatches]
    if not measured:
        return "<p>Every measured value is what the file gives, to the bit.</p>"
    ordered = sorted(measured, key=lambda n: (n.verdict is not NodeVerdict.UNEXPLAINED, -(n.worst_row or np.inf)))
    rows = "".join(
        f"<tr><td>{escape(place(n.layer, n.stage))}</td><td>{n.verdict}</td><td>{escape(n.arithmetic)}</td>"
        f"{number_cells([n.worst_row, n.tolerance, n.rel_l2, n.max_abs])}</tr>"
        for n in ordered[:20]
    )
    return table(["node", "verdict", "by", "worst position", "tolerance", "rel L2", "max |Δ|"], rows)


def save_plot(report: ReplayReport, target: BinaryIO) -> None:
    """Writes the heat map as PNG: grey is unmeasured, the darkest is exact, a frame is unexplained."""
    from matplotlib.figure import Figure

    nodes = {(node.layer, node.stage): node for node in report.nodes if node.layer != OUTSIDE}
    stages = [stage for stage in Stage if any(known is stage for _, known in nodes)]
    layers = sorted({layer for layer, _ in nodes})
    values = np.array([[_distance(nodes.get((layer, stage))) for layer in layers] for stage in stages])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        np.log10(np.maximum(values.reshape(len(stages), len(layers)), _FLOOR)),
        aspect="auto",
        cmap="magma",
        vmin=float(np.log10(_FLOOR)),
        vmax=1.0,
        interpolation="nearest",
    )
    axes.set_facecolor("lightgrey")
    axes.set_yticks(range(len(stages)), [str(stage) for stage in stages], fontsize=8)
    axes.set_xlabel("layer")
    _mark_unexplained(axes, report, layers, stages)
    figure.colorbar(image, ax=axes).set_label("worst position's relative L2 from the file's value (log10)")
    outside = ", ".join(f"{n.stage}: {n.verdict}" for n in report.nodes if n.layer == OUTSIDE)
    axes.set_title(f"{report.verdict}: local distance of every node\n{outside}", fontsize=10)
    figure.savefig(target, dpi=110, format="png")


def _distance(node: NodeReport | None) -> float:
    if node is None or node.verdict is NodeVerdict.UNMEASURED:
        return np.nan
    # No distance is left of a value that is not finite: the brightest there is.
    return np.inf if node.worst_row is None else node.worst_row


def _mark_unexplained(axes: Any, report: ReplayReport, layers: list[int], stages: list[Stage]) -> None:
    from matplotlib.patches import Rectangle

    for node in report.unexplained:
        if node.layer != OUTSIDE:
            corner = (layers.index(node.layer) - 0.5, stages.index(node.stage) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="cyan", linewidth=2))
