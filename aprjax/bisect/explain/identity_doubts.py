"""What must be said of a trace before it is compared: for dumps of another tool's, which nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.bisect.explain.identity import identify, recovered_tokens
from aprjax.bisect.explain.identity_dump import dump_of, other_model
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.report import SidedFinding
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.trace import AnyTrace
from aprjax.trace.aprt import SIDECAR, is_aprt_folder

if TYPE_CHECKING:
    from rich.console import Console


def doubts(trace: AnyTrace, checkpoint: Checkpoint | None, side: str) -> tuple[SidedFinding, ...]:
    """Findings about a trace whose shapes, positions and tokens were told on a command line, the gravest first.

    Traces that an engine or aprjax wrote say what they are, and cost nothing here.

    Args:
        trace: any.
        checkpoint: the file that it claims to have run; without it nothing can be said.
        side: which side of a report it is.

    Raises:
        CheckpointError: see `identify`.
    """
    if checkpoint is None or trace.info.format != "aprt":
        return ()
    rank = {"error": 0, "warning": 1, "info": 2}
    found = sorted(identify(trace, checkpoint), key=lambda finding: rank[finding.severity])
    return tuple(finding.as_sided(side) for finding in found)


def folder_tokens(side: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The tokens whose embedding rows an APRT folder holds, where neither sidecar nor provenance says what was fed.

    Args:
        side: as the command line has it.
        checkpoint: the file that it is said to be of.

    Returns:
        None for other sides, and where the rows do not tell.

    Raises:
        CheckpointError: the folder is damaged.
    """
    path = Path(side)
    if not path.is_dir() or (path / SIDECAR).is_file() or not is_aprt_folder(path):
        return None
    dump = dump_of(path, None)
    if dump.tokens is not None or other_model(dump, checkpoint) is not None:
        return None
    recovered = recovered_tokens(dump, checkpoint)
    return None if recovered is None else recovered.known


def folder_doubts(side: str, file: Path | None, tokens: list[int] | None = None) -> tuple[IdentityFinding, ...]:
    """What an APRT folder without sidecar is, and of it also what its reader refuses to take; nothing for other sides.

    Args:
        side: as the command line has it.
        file: the checkpoint that it is said to be of; without it nothing can be said.
        tokens: what it is said to have been fed.

    Raises:
        CheckpointError: see `identify`.
    """
    path = Path(side)
    if file is None or not path.is_dir() or (path / SIDECAR).is_file() or not is_aprt_folder(path):
        return ()
    return identify(path, open_checkpoint(file), tokens=tokens)


def print_identity(findings: tuple[IdentityFinding, ...], console: Console) -> None:
    """A paragraph per finding: what the trace is, what to do, and how sure that is."""
    from rich.markup import escape

    colours = {"error": "red", "warning": "yellow", "info": "dim"}
    for finding in findings:
        console.print(f"[{colours[finding.severity]}]{escape(finding.sentence)}[/] [dim]({finding.id})[/]")
        console.print(f"  {escape(finding.next_step)}")
        console.print(f"  [dim]{escape(finding.confidence.sentence())}[/]")
