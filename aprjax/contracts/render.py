"""A check and a lint on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from aprjax.contracts.types import CheckReport, Status

if TYPE_CHECKING:
    from rich.console import Console

    from aprjax.contracts.lint.lint import LintReport

_STYLE = {Status.PASS: "green", Status.FAIL: "red", Status.UNMEASURED: "yellow"}


def render_check(report: CheckReport, console: Console) -> None:
    """Every test with its status and reason, by contract; then the counts, and what decides the exit code."""
    for name, side in report.sides.items():
        digest = "" if side.sha256 is None else f", sha256 {side.sha256[:16]}…"
        console.print(f"{name:6} {escape(side.text)} ({side.format}, {side.arithmetic} arithmetic{digest})")
    for contract in report.contracts:
        mine = [outcome for outcome in report.outcomes if outcome.contract_id == contract.id]
        if not mine:
            continue
        console.print(f"\n[bold]{escape(contract.id)}[/] {contract.metadata.version}")
        for outcome in mine:
            if outcome.test_id in report.not_applicable:
                continue
            style = _STYLE[outcome.status]
            console.print(
                f"  [{style}]{outcome.status:10}[/] {escape(outcome.test_id)}: {escape(outcome.reason)}", soft_wrap=True
            )
        elsewhere = [outcome.test_id for outcome in mine if outcome.test_id in report.not_applicable]
        if elsewhere:
            text = f"  [dim]not about two sides: {escape(', '.join(elsewhere))}[/]"
            console.print(text, soft_wrap=True)
    console.print()
    failed = [outcome.test_id for outcome in report.outcomes if outcome.status is Status.FAIL]
    open_ones = [outcome.test_id for outcome in report.required if outcome.status is Status.UNMEASURED]
    agreed = report.count(Status.UNMEASURED) - len(open_ones)
    console.print(
        f"{report.count(Status.PASS)} passed, [red]{len(failed)} failed[/], {len(open_ones)} unmeasured, "
        f"{agreed} not required (not about two sides, or --allow-unmeasured); {report.seconds:.0f} s"
    )
    for what, ids in (("failed", failed), ("unmeasured", open_ones)):
        if ids:
            console.print(f"{what}: {escape(', '.join(ids))}", soft_wrap=True)


def render_lint(report: LintReport, console: Console) -> None:
    """Every problem with its line, then the counts."""
    for problem in report.problems:
        style = "red" if problem.severity == "error" else "yellow"
        place = f"{problem.path}:{problem.line}" if problem.line else str(problem.path)
        text = f"{escape(place)}: [{style}]{problem.severity}[/] {escape(problem.message)} ({problem.rule})"
        console.print(text, soft_wrap=True)
    tests = sum(count for _, count in report.contracts)
    collected = "" if report.collected is None else f"; pytest collects {report.collected} tests of the bound files"
    console.print(
        f"{len(report.contracts)} contracts, {tests} tests, {report.bound} bound{collected}: "
        f"{len(report.errors)} errors, {len(report.problems) - len(report.errors)} warnings"
    )
