"""Upstream's own formats, read and written: reports of `apr qa`, parity receipts."""

from aprjax.contracts.upstream.qa import Gate, QaReport, read_qa_report
from aprjax.contracts.upstream.receipt import parity_rows, receipt, receipt_problems

__all__ = ["Gate", "QaReport", "parity_rows", "read_qa_report", "receipt", "receipt_problems"]
