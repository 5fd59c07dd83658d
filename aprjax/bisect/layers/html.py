"""The report folder of `layers`: the page, the plots as PNG files, and the JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from aprjax.bisect.layers.plots import save_plot
from aprjax.bisect.page import report_fragment
from aprjax.bisect.page import write_report as write_folder
from aprjax.bisect.report import LayersReport


def write_report(reports: list[LayersReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `layers.json` and a plot per prompt into `folder`; returns the page's path."""
    pictures = {f"layers-{report.prompt.name}.png": partial(save_plot, report) for report in reports}
    return write_folder(document, folder, pictures)


def summary_html(report: LayersReport) -> str:
    """Verdict, cause and the largest local differences, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
