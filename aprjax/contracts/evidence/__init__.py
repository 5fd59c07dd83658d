"""Evidence: what a check measured, written so that others can check it, and the check of what is written."""

from aprjax.contracts.evidence.validate import EvidenceReport, validate_folder
from aprjax.contracts.evidence.write import write_evidence

__all__ = ["EvidenceReport", "validate_folder", "write_evidence"]
