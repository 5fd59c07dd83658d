"""What `diff` and `oracle` show on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from aprjax.trace.aprt import WHOLE_MODEL
from aprjax.trace.oracle import Oracle
from aprjax.trace.stage_diff import FoldersDiff, StageDiff

if TYPE_CHECKING:
    from rich.console import Console


def render_diff(found: StageDiff, console: Console) -> None:
    """Two files: the numbers of the document."""
    console.print(f"a: {escape(found.path_a)}\nb: {escape(found.path_b)}")
    layer = "whole-model" if found.layer == WHOLE_MODEL else found.layer
    console.print(f"layer {layer}, {found.count} elements")
    console.print(
        f"max |a - b| {found.max_abs:.6e} at {found.max_index}, rms {found.rms:.6e}, cosine {found.cosine:.10f}"
    )
    table = Table("index", "a", "b", "|a - b|")
    for index, a, b, difference in found.top:
        table.add_row(str(index), f"{a:.6e}", f"{b:.6e}", f"{difference:.6e}")
    console.print(table)


def render_folders(found: FoldersDiff, console: Console) -> None:
    """Two folders: a row per stage, and what was not measured."""
    console.print(f"a: {escape(found.folder_a)}\nb: {escape(found.folder_b)}")
    table = Table("file", "elements", "max |a - b|", "rms", "cosine")
    for diff in found.diffs:
        name = diff.path_a.removeprefix(found.folder_a).lstrip("/\\")
        table.add_row(escape(name), str(diff.count), f"{diff.max_abs:.3e}", f"{diff.rms:.3e}", f"{diff.cosine:.8f}")
    console.print(table)
    for name, reason in found.unmeasured.items():
        console.print(f"unmeasured: {name}: {escape(reason)}")


def render_oracle(found: Oracle, console: Console) -> None:
    """What was written, and the next token."""
    for name, nbytes in found.files:
        console.print(f"{escape(str(found.folder / name))} ({nbytes} bytes)")
    for name in found.absent:
        console.print(f"not written, since the engine does not yield it: {name}")
    console.print(f"tokens: {list(found.tokens)}")
    console.print(f"argmax of {found.vocabulary} logits: {found.argmax} {escape(repr(found.argmax_text))}")


def oracle_json(found: Oracle) -> dict[str, Any]:
    """A dict of plain JSON values."""
    return {
        "schema": "aprjax.oracle/1",
        "folder": str(found.folder),
        "files": [{"path": name, "bytes": nbytes} for name, nbytes in found.files],
        "tokens": list(found.tokens),
        "vocab_size": found.vocabulary,
        "argmax_token": found.argmax,
        "argmax_text": found.argmax_text,
        "absent": list(found.absent),
    }
