"""The commands about one file: `convert`, `inspect` and `fetch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import SIDE
from aprjax.console import progress, show


@command
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help=f"A {SIDE}.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf or .apr file, or a folder for safetensors.")],
    keep_blocks: Annotated[
        bool, typer.Option("--keep-blocks", help="Keep every block type that OUT can hold; widen only the others.")
    ] = False,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write what was done as JSON; - is stdout.")
    ] = None,
) -> int:
    """Convert between GGUF, APR v2 and safetensors, by default as `apr import` does."""
    from aprjax.checkpoint.convert import convert as convert_checkpoint
    from aprjax.checkpoint.render import render_conversion

    with progress() as report:
        done = convert_checkpoint(
            source, target, keep_blocks=keep_blocks, progress=lambda done, total: report("writing", done, total)
        )
    show(lambda console: render_conversion(done, console), done.to_json(), json_out)
    return 0


@command
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"A {SIDE}.")],
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write it as JSON; - is stdout."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Decode every tensor, and report values that no sound model has.")
    ] = False,
) -> int:
    """Show a checkpoint's config, tensors, block types, SHA-256 and findings."""
    from aprjax.checkpoint.inspect import inspect as inspect_checkpoint
    from aprjax.checkpoint.render import render_inspection

    inspection = inspect_checkpoint(file)
    # A GGUF file of another architecture is listed, but has no tensors whose use is known.
    if values and inspection.config is not None:
        from aprjax.checkpoint.open import open_checkpoint
        from aprjax.checkpoint.values import scan_values

        checkpoint = open_checkpoint(file)
        done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        with progress() as report:

            def advance(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                report("decoding", done, total)

            found = scan_values(checkpoint, progress=advance)
        # NaN is found without decoding, too.
        known = {(finding.id, finding.tensor) for finding in inspection.findings}
        found = [finding for finding in found if (finding.id, finding.tensor) not in known]
        inspection = replace(inspection, findings=(*inspection.findings, *found))
    show(lambda console: render_inspection(inspection, console), inspection.to_json(), json_out)
    return 0


@command
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="qwen2.5-coder-0.5b or qwen2.5-coder-1.5b.")],
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Where to; by default the cache.")] = None,
) -> int:
    """Fetch an official Qwen2.5-Coder-Instruct GGUF (q4_k_m), check its SHA-256 and print its path."""
    from aprjax.checkpoint.fetch import fetch as fetch_model
    from aprjax.checkpoint.fetch import known_models

    if model not in known_models():
        raise typer.BadParameter(f"the model {model!r} is unknown; known: {', '.join(known_models())}")
    with progress() as report:
        print(fetch_model(model, folder, report))
    return 0
