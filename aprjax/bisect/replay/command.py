"""What `python -m bisect replay` does: open, run an engine if one is named, replay; and the report for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.explain.identity_doubts import doubts, folder_tokens
from aprjax.bisect.open_sides import SideLike, live_trace, opened_file, opened_side
from aprjax.bisect.replay.judge import presets_to_try, replay
from aprjax.bisect.replay.report import NodeReport, NodeVerdict, ReplayReport, place
from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.bisect.traced import arithmetic_of
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.text.prompt import encode_prompt, read_prompt_file
from aprjax.trace import AnyTrace

if TYPE_CHECKING:
    from rich.console import Console

# Unexplained nodes listed; the JSON has all of them.
_MOST_NODES = 12


def replay_side(
    side: SideLike,
    file: str | Path | Checkpoint,
    *,
    arithmetic: str | Arithmetic | None = None,
    force_file: bool = False,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    times: str = "none",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ReplayReport:
    """Replays a side by a file; see `aprjax.cli_judging.replay` for the options.

    Raises:
        CheckpointError: the side or the file cannot be read, or the file is not the one that was run.
    """
    enable_compilation_cache()
    checkpoint = opened_file(file)
    if prompt_file is not None:
        prompt = read_prompt_file(prompt_file)
    ids = tokens if prompt is None else encode_prompt(checkpoint, prompt, times)
    named = isinstance(side, str | Path)
    read = folder_tokens(str(side), checkpoint) if named and ids is None else None
    opened = opened_side(side, config=checkpoint.config, tokens=ids if read is None else list(read))
    with ExitStack() as stack:
        trace = live_trace(opened, ids, stack)
        doubted = (*_told(read), *doubts(trace, checkpoint, "trace"))
        found = replay(trace, checkpoint, _arithmetics(arithmetic, trace), force_file=force_file, progress=progress)
        return replace(found, findings=(*doubted, *found.findings))


def _told(read: tuple[int, ...] | None) -> tuple[SidedFinding, ...]:
    if read is None:
        return ()
    text = (
        f"the folder says no tokens; its embedding's rows are those of {','.join(map(str, read))}, so these are taken"
    )
    return (SidedFinding("trace-tokens-recovered", "info", text, side="trace"),)


def _arithmetics(name: str | Arithmetic | None, trace: AnyTrace) -> tuple[Arithmetic, ...]:
    """The asked one; unasked, the trace's own, or all where nothing is known of it."""
    if name == "auto":
        return presets_to_try()
    if name is not None:
        return (preset(name) if isinstance(name, str) else name,)
    own = arithmetic_of(trace)
    return presets_to_try() if own is None else (own,)


def render(report: ReplayReport, console: Console) -> None:
    """What was replayed, the unexplained nodes, a line per stage, and the verdict, in 80 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    trace, file = report.trace, report.file
    console.print(f"trace  {escape(Path(trace['path']).name)}, {report.tokens} tokens, {escape(trace['arithmetic'])}")
    console.print(f"file   {escape(Path(file['path']).name)} [dim]sha256 {file['sha256'][:16]}…[/]")
    console.print(f"[dim]replayed by {', '.join(report.arithmetics)}[/]")
    for finding in report.findings:
        console.print(f"{finding.severity} {escape(finding.message)} [dim]({finding.id})[/]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("exact", "rounding", "unexpl.", "unmeas.", "unequal", "worst row"):
        table.add_column(heading, justify="right")
    for stage in dict.fromkeys(node.stage for node in report.nodes):
        nodes = [node for node in report.nodes if node.stage is stage]
        table.add_row(str(stage), *_counts(nodes), style="bold red" if _any_unexplained(nodes) else None)
    console.print(table)
    for node in report.unexplained[:_MOST_NODES]:
        console.print(f"[red]{place(node.layer, node.stage)}[/]: {escape(node.reason)}")
    if len(report.unexplained) > _MOST_NODES:
        console.print(f"[dim]… and {len(report.unexplained) - _MOST_NODES} more (all are in the JSON)[/]")
    if report.explanation:
        console.print(f"explained best by: {escape(report.explanation)}")
    colour = {Verdict.AGREE: "green", Verdict.DIVERGENCE: "red"}.get(report.verdict, "magenta")
    console.print(f"[bold {colour}]{str(report.verdict).upper()}[/]")
    console.print(f"  {escape(report.reason)}")


def _any_unexplained(nodes: list[NodeReport]) -> bool:
    return any(node.verdict is NodeVerdict.UNEXPLAINED for node in nodes)


def _counts(nodes: list[NodeReport]) -> list[str]:
    counts = [sum(node.verdict is verdict for node in nodes) for verdict in NodeVerdict]
    rows = [node.worst_row for node in nodes if node.worst_row is not None]
    unequal = [node.mismatches for node in nodes if node.mismatches is not None]
    return [
        *(str(count or "") for count in counts),
        str(sum(unequal)) if unequal else "–",
        ("0" if max(rows) == 0 else f"{max(rows):.1e}") if rows else "–",
    ]
