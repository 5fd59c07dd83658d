"""Inspections and conversion reports for a terminal. rich is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.checkpoint.convert import ConversionReport
from aprjax.checkpoint.inspect import Inspection, printable
from aprjax.checkpoint.types import Finding

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS = {"info": "cyan", "warning": "yellow", "error": "red"}


def render_inspection(inspection: Inspection, console: Console, *, tensors: bool = True) -> None:
    """Print an inspection; `tensors` includes the list of all tensors."""
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_row("file", _plain(inspection.path))
    facts.add_row("format", inspection.format)
    for name, size in inspection.files.items():
        facts.add_row("size", f"{size:,} bytes" + (f"  {_plain(Path(name).name)}" if len(inspection.files) > 1 else ""))
    facts.add_row("sha256", inspection.sha256 or "not computed")
    config = inspection.config
    if config is not None:
        facts.add_row(
            "model", f"{config.architecture}, {inspection.elements:,} weights in {len(inspection.tensors)} tensors"
        )
        facts.add_row(
            "shape",
            f"{config.num_layers} layers, hidden {config.hidden_size}, ffn {config.intermediate_size}, "
            f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} key-value heads",
        )
        facts.add_row(
            "constants",
            f"rope theta {config.rope_theta:g} ({config.rope_pairing}), eps {config.rms_norm_eps:g}, "
            f"context {config.max_position_embeddings}, vocabulary {config.vocab_size}",
        )
    if inspection.tied_head is not None:
        facts.add_row("head", "the embedding (tied)" if inspection.tied_head else "its own weights")
    vocabulary = inspection.vocabulary
    if vocabulary is not None:
        ids = ", ".join(
            f"{kind} {token_id}"
            for kind, token_id in (
                ("bos", vocabulary.bos_token_id),
                ("eos", vocabulary.eos_token_id),
                ("padding", vocabulary.padding_token_id),
            )
            if token_id is not None
        )
        facts.add_row(
            "vocabulary", f"{vocabulary.tokens} tokens, {vocabulary.merges} merges; {ids or 'no special ids'}"
        )
        facts.add_row("pre-tokenizer", _plain(vocabulary.pre_tokenizer or "not stated"))
    template = inspection.chat_template_characters
    facts.add_row("chat template", "none" if template is None else f"{template} characters")
    console.print(facts)
    blocks = Table("block type", "tensors", "bytes", title="Block types", title_justify="left")
    for entry in inspection.block_types:
        blocks.add_row(entry.block_type, str(entry.tensors), f"{entry.nbytes:,}")
    console.print(blocks)
    if tensors:
        listing = Table("tensor", "shape", "type", "bytes", "offset", title="Tensors", title_justify="left")
        for tensor in inspection.tensors:
            shape = " x ".join(map(str, tensor.shape))
            listing.add_row(_plain(tensor.name), shape, tensor.block_type, f"{tensor.nbytes:,}", str(tensor.offset))
        console.print(listing)
    console.print(findings_table(inspection.findings) if inspection.findings else "no findings")


def render_conversion(report: ConversionReport, console: Console) -> None:
    """Print what a conversion did."""
    console.print(
        f"{_plain(report.source)} ({report.source_format}) -> {_plain(report.target)} ({report.target_format}): "
        f"{report.tensors} tensors, {report.nbytes:,} bytes"
    )
    for block_type, count in report.copied.items():
        console.print(f"  {count:4} {block_type}: bytes kept")
    for change, count in report.decoded.items():
        console.print(f"  {count:4} {change}")
    for note in report.notes:
        console.print(f"note: {_plain(note)}")
    if report.findings:
        console.print(findings_table(report.findings))


def findings_table(findings: tuple[Finding, ...]) -> Table:
    """Findings as a table, in their order."""
    from rich.table import Table

    table = Table("severity", "id", "where", "message", title="Findings", title_justify="left")
    for finding in findings:
        colour = _COLOURS[finding.severity]
        where = finding.tensor or ("" if finding.offset is None else f"offset {finding.offset}")
        message = finding.message + (f" [{finding.reference}]" if finding.reference else "")
        table.add_row(f"[{colour}]{finding.severity}[/]", finding.id, _plain(where), _plain(message))
    return table


def _plain(text: str) -> str:
    """Text from a file: without control characters, and without being taken for rich's markup."""
    from rich.markup import escape

    return escape(printable(text))
