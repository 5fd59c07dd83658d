"""Contracts: promises with the tests that could break them, what the tests measured, and the evidence of it."""

from aprjax.contracts.types import CheckedSide, CheckReport, Contract, FalsificationTest, Status, TestOutcome, Threshold

__all__ = ["CheckReport", "CheckedSide", "Contract", "FalsificationTest", "Status", "TestOutcome", "Threshold"]
