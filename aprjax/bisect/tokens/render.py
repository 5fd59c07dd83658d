"""The `tokens` report for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.bisect.tokens.prompt import shortened
from aprjax.bisect.tokens.report import FedSide, Kind, PromptTokens, TokenizerInfo, TokensComparison

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {Verdict.AGREE: "bold green", Verdict.DIVERGENCE: "bold red", Verdict.UNMEASURED: "bold magenta"}
_COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}
# Rows of a prompt: about a screen, and those before a difference that show where in the text it is.
_ROWS, _BEFORE = 24, 4
# Columns of a token's text; two sides of it and two ids fit into 80.
_PIECE = 18
_DIFF_LINES = 24
_MOST_FINDINGS = 16


def render(report: TokensComparison, console: Console) -> None:
    """The two tokenizers, the findings, every prompt's tokens side by side, the templates, the verdict."""
    from rich.markup import escape

    for name, side in report.sides.items():
        console.print(f"{name:6} {escape(_side_line(side))} [dim]{escape(report.engine.get(name, ''))}[/]")
    order = {"error": 0, "warning": 1, "info": 2}
    findings = sorted(report.findings, key=lambda finding: order[finding.severity])
    for finding in findings[:_MOST_FINDINGS]:
        console.print(_finding_line(finding))
    if len(findings) > _MOST_FINDINGS:
        console.print(f"[dim]… and {len(findings) - _MOST_FINDINGS} more findings (all are in the JSON)[/]")
    for prompt in report.prompts:
        _print_prompt(prompt, console)
    _print_template(report, console)
    console.print(f"[{_STYLES.get(report.verdict, 'bold')}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def _side_line(side: TokenizerInfo | None) -> str:
    if side is None:
        return "no tokenizer at hand"
    settings = f"bos {side.bos}, eos {side.eos}, add_bos {side.add_bos}, {'a' if side.template else 'no'} template"
    return f"{Path(side.path).name}: {side.tokens} tokens, {side.merges} merges, {settings}"


def _finding_line(finding: SidedFinding) -> str:
    from rich.markup import escape

    side = f"{finding.side}: " if finding.side not in ("", "both") else ""
    where = f"{finding.id}, {finding.reference}" if finding.reference else finding.id
    colour = _COLOURS[finding.severity]
    return f"[{colour}]{finding.severity:7}[/] {escape(side + finding.message)} [dim]({escape(where)})[/]"


def _print_prompt(prompt: PromptTokens, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    text = "" if prompt.text is None else f" {shortened(prompt.text, 48)!r}, wrapped {prompt.wrap}"
    sides = (("model", prompt.model), ("ref", prompt.ref))
    counts = ", ".join(f"{name} {len(side.tokens)} tokens ({side.source})" for name, side in sides)
    console.print(f"\n{prompt.name}{escape(text)}: {counts}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, right in (("byte", True), ("model", True), ("", False), ("ref", True), ("", False), ("", False)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    start, stop = shown_rows(prompt)
    for ours, theirs in prompt.rows[start:stop]:
        cells = [*_cells(prompt.model, ours), *_cells(prompt.ref, theirs)]
        same = prompt.measured and cells[1] == cells[4]
        byte = cells[3] if theirs is not None else cells[0]
        mark = "" if same or not prompt.measured else "≠"
        row = (byte, cells[1], escape(cells[2]), cells[4], escape(cells[5]), mark)
        table.add_row(*row, style="red" if mark else None)
    if start:
        console.print(f"[dim]the first {start} rows are the same[/]")
    console.print(table)
    if stop < len(prompt.rows):
        console.print(f"[dim]… and {len(prompt.rows) - stop} more rows (all are in the JSON)[/]")


def shown_rows(prompt: PromptTokens) -> tuple[int, int]:
    """The rows that a screen shows: from a little before the first difference, else from the start."""
    differing = (n for n, (a, b) in enumerate(prompt.rows) if a is None or b is None or _ids(prompt, a, b))
    first = next(differing, 0) if prompt.measured else 0
    start = max(0, first - _BEFORE)
    return start, min(len(prompt.rows), start + _ROWS)


def _ids(prompt: PromptTokens, ours: int, theirs: int) -> bool:
    return prompt.model.tokens[ours].id != prompt.ref.tokens[theirs].id


def _cells(side: FedSide, at: int | None) -> tuple[str, str, str]:
    if at is None:
        return "", "", ""
    token = side.tokens[at]
    kind = "" if token.kind is Kind.NORMAL else f" [{token.kind}]"
    return str(token.start), str(token.id), shortened(token.text.replace(" ", "·"), _PIECE) + kind


def _print_template(report: TokensComparison, console: Console) -> None:
    from rich.markup import escape

    template = report.template
    if template is None or (template.model is None and template.ref is None):
        return
    for title, diff in (("chat templates, ref → model", template.diff), ("--wrap once → template", template.wrap_diff)):
        if not diff:
            continue
        lines = diff.splitlines()[2:]
        console.print(f"\n{title} (user turn {escape(repr(shortened(template.user, 32)))})")
        for line in lines[:_DIFF_LINES]:
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
            console.print(f"  [{colour}]{escape(line)}[/]")
        if len(lines) > _DIFF_LINES:
            console.print(f"  [dim]… and {len(lines) - _DIFF_LINES} more lines[/]")
    console.print()
