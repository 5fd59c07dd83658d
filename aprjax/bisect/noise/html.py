"""The report folder of `noise`: the page, the plot as a PNG file, and the JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from aprjax.bisect.noise.plot import save_plot
from aprjax.bisect.noise.report import NoiseReport
from aprjax.bisect.page import write_report as write_folder


def write_report(report: NoiseReport, folder: Path) -> Path:
    """Writes `index.html`, `noise.json` and `noise.png` into `folder`; returns the page's path."""
    return write_folder(report.to_json(), folder, {"noise.png": partial(save_plot, report)})
