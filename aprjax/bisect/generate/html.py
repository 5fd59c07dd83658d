"""The report folder of `generate`: the page, the plots as PNG files, and the JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from aprjax.bisect.generate.plot import save_plot
from aprjax.bisect.generate.report import GenerateReport
from aprjax.bisect.page import report_fragment
from aprjax.bisect.page import write_report as write_folder


def write_report(reports: list[GenerateReport], document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html`, `generate.json` and a plot per prompt into `folder`; returns the page's path."""
    pictures = {f"generate-{report.prompt.name}.png": partial(save_plot, report) for report in reports}
    return write_folder(document, folder, pictures)


def summary_html(report: GenerateReport) -> str:
    """Verdict, texts and the first difference, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
