"""The report folder of `chatml`: the page and the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprjax.bisect.chatml.report import ChatmlReport
from aprjax.bisect.page import report_fragment
from aprjax.bisect.page import write_report as write_folder


def write_report(report: ChatmlReport, document: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html` and `chatml.json` into `folder`; returns the page's path.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    del report  # the page is made of the JSON alone
    return write_folder(document, folder)


def summary_html(report: ChatmlReport) -> str:
    """Verdict, causes and claims, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
