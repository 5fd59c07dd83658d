"""The report folder of `files`: the page and the JSON."""

from __future__ import annotations

from pathlib import Path

from aprjax.bisect.files.report import FilesComparison
from aprjax.bisect.page import report_fragment
from aprjax.bisect.page import write_report as write_folder


def write_report(report: FilesComparison, folder: Path) -> Path:
    """Writes `index.html` and `files.json` into `folder`; returns the page's path."""
    return write_folder(report.to_json(), folder)


def summary_html(report: FilesComparison) -> str:
    """Verdict, causes, differing keys and tensors, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
