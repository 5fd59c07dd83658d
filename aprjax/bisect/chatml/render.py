"""The `chatml` report for a terminal: what ran, the cells, why the sides part, the claims in words."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aprjax.bisect.chatml.judged import Cell
from aprjax.bisect.chatml.report import ChatmlReport, parted_at

_VERDICTS = {"alike": "bold green", "part": "bold red", "undecidable": "bold magenta"}
_CLAIMS = {"supported": "red", "refuted": "green", "not decidable": "yellow"}
_STATES = {"clean": "green", "flagged": "yellow", "wrong": "red", "loops": "red", "degenerate": "bold red"}
# Characters of an answer that a table shows; the JSON has all of it.
_TEXT = 44


def render(report: ChatmlReport, console: Console) -> None:
    """Prints the report."""
    factorial = report.factorial
    for name, side in factorial.sides.items():
        stops = ", ".join(map(str, sorted(side.declared_stops))) or "none"
        console.print(f"{name:6} {escape(os.path.basename(side.path))}", soft_wrap=True)
        console.print(f"       [dim]{side.format}, declares stop tokens: {stops}, sha256 {side.sha256[:16]}…[/]")
    console.print(f"files  {escape(factorial.facts.files_sentence)}")
    console.print(f"ran    {report.computed} runs of {factorial.max_new_tokens} tokens on {escape(factorial.backend)}")
    for proof, count in report.sharing().items():
        console.print(f"shared {count} runs with {escape(proof)}")
    for finding in report.findings:
        colour = {"error": "red", "warning": "yellow", "info": "dim"}[finding.severity]
        side = f"{finding.side}: " if finding.side not in ("", "both") else ""
        console.print(f"[{colour}]{finding.severity:7}[/] {escape(side + finding.message)} [dim]({finding.id})[/]")
    console.print(_cells(report))
    console.print(_claims(report))
    asked = ", ".join(f"{factor} {ours} against {theirs}" for factor, (ours, theirs) in report.asked.items())
    if asked:
        console.print(f"compared: {asked}, all else alike")
    console.print(f"[{_VERDICTS[report.verdict]}]{report.verdict.upper()}[/] {escape(report.causes.reason)}")
    if report.causes.blamed:
        console.print(f"[bold]cause:[/] {escape(', '.join(report.causes.blamed))}")
    console.print(f"[dim]{report.seconds:.1f} s[/]")


def _cells(report: ChatmlReport) -> Table:
    """A row per prompt and wrap: the reference's answer under the first arithmetic, and where others part from it."""
    factorial = report.factorial
    title = "cells: the reference's answer with stop tokens; how sound it is with (on) and without; its margins"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("prompt", "wrap", "answer", "ends", "on", "off", "first", "least"):
        table.add_column(name, overflow="fold")
    table.add_column("model", overflow="fold")
    first, *others = factorial.arithmetics
    for name in others:
        table.add_column(name, overflow="fold")
    for prompt in factorial.prompts:
        for wrap in factorial.wraps:
            on = report.cells.get(("ref", prompt, wrap, first, "on"))
            off = report.cells.get(("ref", prompt, wrap, first, "off"))
            if on is None or off is None:
                continue
            apart = {
                name: parted_at(factorial, ("model", prompt, wrap, name, "off"), ("ref", prompt, wrap, name, "off"))
                for name in factorial.arithmetics
            }
            moved = [
                parted_at(factorial, ("ref", prompt, wrap, name, "off"), ("ref", prompt, wrap, first, "off"))
                for name in others
            ]
            table.add_row(
                prompt,
                wrap,
                escape(_short(on)),
                f"{on.stop_token} at {len(on.tokens)}" if on.stop_token is not None else "budget",
                _state(on),
                _state(off),
                f"{on.first_margin:.3g}",
                f"{on.least_margin:.2g}",
                _alike(apart),
                *(f"parts at {step}" if step is not None else "alike" for step in moved),
            )
    return table


def _alike(apart: dict[str, int | None]) -> str:
    parted = {name: step for name, step in apart.items() if step is not None}
    if not parted:
        return "alike"
    steps = set(parted.values())
    if len(parted) == len(apart) and len(steps) == 1:
        return f"[red]parts at {steps.pop()}[/]"
    return "[red]" + ", ".join(f"{name}: {step}" for name, step in parted.items()) + "[/]"


def _state(cell: Cell) -> str:
    onset = cell.repetition.onset
    repeats = "" if onset is None else f", repeats from {onset}"
    return f"[{_STATES[cell.state]}]{cell.state}[/]{repeats}"


def _short(cell: Cell) -> str:
    text = cell.text.encode("unicode_escape").decode("ascii") if not cell.text.isprintable() else cell.text
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _claims(report: ChatmlReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="claims", title_justify="left", pad_edge=False)
    table.add_column("claim", overflow="fold", max_width=34)
    table.add_column("these files", overflow="fold")
    table.add_column("why", overflow="fold")
    for claim in report.claims:
        table.add_row(claim.claim, f"[{_CLAIMS[claim.verdict]}]{claim.verdict}[/]", escape(claim.reason))
    return table
