"""A check as an HTML page, and as the fragment that notebooks show."""

from __future__ import annotations

from pathlib import Path

from aprjax.contracts.types import CheckReport


def write_report(report: CheckReport, folder: Path) -> Path:
    """Writes `index.html`, `check.json` and the raw outputs into `folder`; returns the page's path."""
    from aprjax.bisect.page import write_report as write_folder
    from aprjax.checkpoint.atomic import atomic_file

    page = write_folder(report.to_json(), folder, beside=report.artifacts)
    for name, text in report.artifacts.items():
        with atomic_file(folder / name) as stream:
            stream.write(text.encode("utf-8", "replace"))
    return page


def summary_html(report: CheckReport) -> str:
    """The counts, and the outcome of every test, as an HTML fragment."""
    from aprjax.bisect.page import report_fragment

    return report_fragment(report.to_json())
