"""Commands that stand in for upstream's: `diff`, as `apr diff --values`; `oracle`, as their Hugging Face script."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import JsonOut, arithmetic_option
from aprjax.console import show


class Dtype(StrEnum):
    """What the oracle computes in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@command
def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A stage's .bin file, a folder of them (APRT), or a saved trace.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    *,
    limit: Annotated[int, typer.Option(min=1, metavar="K", help="How many of the largest differences.")] = 10,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write apr-stage-diff-v1 as JSON; - is stdout.")
    ] = None,
) -> int:
    """Compare stage tensors element by element, as `apr diff --values` does.

    Exit code 0 where all are equal, 1 where an element differs, 3 where a stage is missing on one side.
    """
    from aprjax.trace.render_upstream import render_diff, render_folders
    from aprjax.trace.stage_diff import diff_files, diff_folders, diff_traces

    kinds = [(path.is_dir(), path.suffix == ".safetensors") for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise typer.BadParameter("give two stage files, two folders of them, or two saved traces")
    if kinds[0] == (False, True):
        from aprjax.trace import Trace

        traces = diff_traces(Trace.load(first), Trace.load(second), limit=limit)
        show(lambda console: render_folders(traces, console), traces.to_json(), json_out)
        return traces.exit_code
    if first.is_dir():
        folders = diff_folders(first, second, limit=limit)
        show(lambda console: render_folders(folders, console), folders.to_json(), json_out)
        return folders.exit_code
    found = diff_files(first, second, limit=limit)
    if json_out == "-":
        sys.stdout.write(found.to_text())
    else:
        show(lambda console: render_diff(found, console), found.to_json(), json_out)
    return int(not found.identical)


@command
def oracle(
    *,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the stages go: layer-N/STAGE.bin, STAGE.bin.")],
    model: Annotated[
        str,
        typer.Option(metavar="SIDE", help="A checkpoint, llama.cpp:FILE.gguf, hf:DIR, or a name in the Hub's cache."),
    ] = "Qwen/Qwen2.5-Coder-7B-Instruct",
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Fed as it is.")] = "What is 2+2?",
    layers: Annotated[str, typer.Option(metavar="N,N,…", help="Layers whose stages are written.")] = "0",
    dtype: Annotated[
        Dtype | None, typer.Option(help="16 bits run a Hugging Face folder by transformers; else aprjax computes.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Of jax; by default its first.")] = None,
    arithmetic: Annotated[str | None, arithmetic_option("aprjax (by default float32)")] = None,
    substages: Annotated[
        bool, typer.Option("--with-attn-substages/--no-attn-substages", help="Write the stages within the attention.")
    ] = True,
    json_out: JsonOut = None,
) -> int:
    """Write a model's stages as upstream's Hugging Face oracle script does, computed by aprjax."""
    try:
        numbers = sorted({int(part) for part in layers.split(",") if part.strip()})
    except ValueError:
        raise typer.BadParameter(f"expected layers with commas between them (0,1,2), found {layers!r}") from None
    from aprjax.bisect.asked import check_destinations
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.trace.oracle import run_oracle
    from aprjax.trace.render_upstream import oracle_json, render_oracle

    check_destinations(json_out)
    if dtype in (None, Dtype.FLOAT32):
        enable_compilation_cache()
    found = run_oracle(
        model,
        output,
        prompt=prompt,
        layers=numbers,
        dtype=None if dtype is None else dtype.value,
        device=device,
        arithmetic=arithmetic,
        substages=substages,
    )
    show(lambda console: render_oracle(found, console), oracle_json(found), json_out)
    return 0
