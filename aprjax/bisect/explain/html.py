"""An explanation as the fragment that notebooks show."""

from __future__ import annotations

from aprjax.bisect.explain.report import ExplainReport
from aprjax.bisect.page import report_fragment


def summary_html(report: ExplainReport) -> str:
    """Verdict, explanations and what is left, as an HTML fragment (used by notebooks)."""
    return report_fragment(report.to_json())
