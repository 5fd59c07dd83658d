"""The report folder of `replay`: the page, the heat map as a PNG file, and the JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from aprjax.bisect.page import write_report as write_folder
from aprjax.bisect.replay.plot import save_plot
from aprjax.bisect.replay.report import ReplayReport


def write_report(report: ReplayReport, folder: Path) -> Path:
    """Writes `index.html`, `replay.json` and `replay.png` into `folder`; returns the page's path."""
    return write_folder(report.to_json(), folder, {"replay.png": partial(save_plot, report)})
