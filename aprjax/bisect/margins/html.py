"""The report folder of `margins`: the page, the plots as PNG files, and the JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from aprjax.bisect.margins.plot import save_strip
from aprjax.bisect.margins.report import MarginsReport
from aprjax.bisect.page import report_fragment
from aprjax.bisect.page import write_report as write_folder


def write_report(reports: list[MarginsReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `margins.json` and a plot per prompt into `folder`; returns the page's path."""
    pictures = {f"margins-{report.fed.name}.png": partial(save_strip, report) for report in reports}
    return write_folder(document, folder, pictures)


def summary_html(report: MarginsReport) -> str:
    """Verdict, positions that matter and summary, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
