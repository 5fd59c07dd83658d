"""What `python -m aprjax trace` does: open a side, run it, summarise what was captured, save it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.text.prompt import encode_prompt, read_prompt_file
from aprjax.trace.aprt import AprtTrace
from aprjax.trace.aprt_writer import write_aprt
from aprjax.trace.capture import EVERYTHING, Capture, Selected
from aprjax.trace.llama_cpp import save_llama_cpp
from aprjax.trace.memory import AnyTrace, save
from aprjax.trace.sides import Side, open_side
from aprjax.trace.trace import TraceInfo

if TYPE_CHECKING:
    from rich.console import Console

    from aprjax.qwen2.arithmetic import Arithmetic
    from aprjax.trace.streamed import Piece

SCHEMA = "aprjax.trace-summary/1"


def make_trace(
    side: str,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    times: str = "none",
    arithmetic: str | None = None,
    file: Path | None = None,
    target: Path | None = None,
    capture: Capture = EVERYTHING,
) -> dict[str, Any]:
    """Traces a side and saves it where that is asked for; see `aprjax.cli_layers.trace` for the options.

    Returns:
        The summary, as JSON values.

    Raises:
        CheckpointError: the side cannot be opened or run, or the target cannot be written.
    """
    checkpoint = open_checkpoint(file) if file is not None else None
    opened = open_side(side, config=checkpoint.config if checkpoint is not None else None, tokens=tokens)
    if checkpoint is not None:
        opened = _vouched(opened, checkpoint)
    if opened.kind == "checkpoint":  # the others need no jax
        enable_compilation_cache()
    ids = tokens if tokens is not None else _tokenize(opened, prompt, prompt_file, times)
    asked = _Asked(opened, ids, preset(arithmetic) if arithmetic is not None else None, capture, target)
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        found = _run_checkpoint(asked, Path(folder)) if opened.kind == "checkpoint" else _take(asked, Path(folder))
    info = found.info
    return {
        "schema": SCHEMA,
        "side": {
            "text": side,
            "kind": opened.kind,
            "path": info.path,
            "sha256": info.sha256,
            "format": info.format,
            "arithmetic": info.arithmetic,
            "engine": dict(info.engine),
        },
        "tokens": list(info.tokens),
        "positions": list(info.positions),
        "head_positions": list(info.head_positions),
        "values": [{"layer": layer, "stage": str(stage), **like} for (layer, stage), like in found.statistics.items()],
        "absent": _absent(found.statistics),
        "unvouched": dict(found.unvouched),
        "saved": None if target is None else str(target),
        "left_out": list(found.left_out),
    }


@dataclass(frozen=True)
class _Asked:
    side: Side
    ids: list[int] | None
    arithmetic: Arithmetic | None
    capture: Capture
    target: Path | None

    @property
    def file(self) -> Path | None:
        """Where a trace is to be streamed to."""
        return self.target if self.target is not None and _is_saved_trace(self.target) else None


@dataclass(frozen=True)
class _Found:
    info: TraceInfo
    statistics: Mapping[tuple[int, Stage], dict[str, Any]]
    left_out: tuple[str, ...] = ()
    unvouched: Mapping[str, str] = field(default_factory=dict)


def _run_checkpoint(asked: _Asked, folder: Path) -> _Found:
    """Value by value, to the file if one is asked for: one layer is in memory at a time."""
    from aprjax.trace.streamed import StreamedRun

    assert asked.side.checkpoint is not None
    arithmetic = asked.arithmetic or preset("llama.cpp")
    run = StreamedRun(asked.side.checkpoint, asked.side.require(asked.ids), arithmetic, asked.capture)
    if asked.target is None:
        return _Found(run.info(), _statistics_of(run.pieces()))
    trace = run.save(asked.file or folder / "trace.safetensors")
    left_out = () if asked.file is not None else write_aprt(trace, asked.target)
    return _Found(trace.info, {key: _statistics(trace[key]) for key in trace}, left_out)


def _take(asked: _Asked, folder: Path) -> _Found:
    """A recorded trace, or an engine's; what llama.cpp computes is streamed where it is to be saved."""
    side, whole = asked.side, asked.capture.everything
    if side.kind == "llama.cpp" and asked.target is not None and asked.arithmetic is None:
        at_once = asked.file if whole else None
        trace = save_llama_cpp(
            side.path, side.require(asked.ids), at_once or folder / "trace.safetensors", side.options
        )
    else:
        at_once, trace = None, side.trace(asked.ids, arithmetic=asked.arithmetic)
    if not whole:
        trace = Selected(trace, asked.capture)
    left_out = _save(trace, asked.target) if asked.target is not None and at_once is None else ()
    statistics = {key: _statistics(trace[key]) for key in trace}
    return _Found(trace.info, statistics, left_out, getattr(trace, "unvouched", {}))


def _is_saved_trace(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _vouched(side: Side, checkpoint: Checkpoint) -> Side:
    """The side with the file that the user says it came from, which the trace then names.

    Raises:
        CheckpointError: the side knows its file, and it is another one; or it runs a model itself.
    """
    trace = side.recorded
    if trace is None or (trace.info.sha256 and trace.info.sha256 != checkpoint.sha256()):
        what = "runs a model itself" if trace is None else f"was made from a file with sha256 {trace.info.sha256}"
        raise CheckpointError(
            f"the side {what}, and --file names {checkpoint.path} with sha256 {checkpoint.sha256()}",
            file=side.path,
            fix="leave --file out: it is for APRT folders without a sidecar",
        )
    if not isinstance(trace, AprtTrace) or trace.info.sha256:
        return side
    engine = {**trace.info.engine, "file and tokens": "as told on the command line: the folder does not say"}
    info = replace(trace.info, path=str(checkpoint.path), sha256=checkpoint.sha256(), engine=engine)
    return replace(side, recorded=replace(trace, info=info))


def _tokenize(side: Side, prompt: str | None, prompt_file: Path | None, times: str) -> list[int] | None:
    if prompt_file is not None:
        prompt = read_prompt_file(prompt_file)
    if prompt is None:
        return None
    if side.checkpoint is None:
        raise CheckpointError(
            "a recorded trace has its tokens, and no tokenizer to make others",
            file=side.path,
            fix="leave the prompt out",
        )
    return encode_prompt(side.checkpoint, prompt, times)


def _save(trace: AnyTrace, target: Path) -> tuple[str, ...]:
    if _is_saved_trace(target):
        save(trace, target)
        return ()
    return write_aprt(trace, target)


def _absent(keys: Iterable[tuple[int, Stage]]) -> list[str]:
    """Stages that no layer has: unmeasured, not equal."""
    present = {stage for _, stage in keys}
    return [str(stage) for stage in Stage if stage not in present]


def _statistics_of(pieces: Iterable[Piece]) -> dict[tuple[int, Stage], dict[str, Any]]:
    """The statistics of a run that is not saved; the head's come in batches and are joined."""
    found: dict[tuple[int, Stage], dict[str, Any]] = {}
    batches: dict[tuple[int, Stage], list[np.ndarray]] = {}
    for piece in pieces:
        key = (piece.layer, piece.stage)
        if len(piece.values) == piece.total_rows:
            found[key] = _statistics(piece.values)
        else:
            batches.setdefault(key, []).append(piece.values)
    return found | {key: _statistics(np.concatenate(parts)) for key, parts in batches.items()}


def _statistics(values: np.ndarray) -> dict[str, Any]:
    """Shape, and what the finite values are like; None where there are none."""
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    finite = values[np.isfinite(values)] if nan or infinite else values
    known = finite.size > 0
    return {
        "shape": list(values.shape),
        "mean": float(finite.mean(dtype=np.float64)) if known else None,
        # The sample standard deviation, as the upstream contracts have it.
        "std": float(finite.std(dtype=np.float64, ddof=1)) if finite.size > 1 else None,
        "max_abs": float(np.abs(finite).max()) if known else None,
        "nan": nan,
        "inf": infinite,
    }


def render(summary: dict[str, Any], console: Console) -> None:
    """Shows a summary: what ran, one line per layer, what is absent, what was saved."""
    from rich.markup import escape
    from rich.table import Table

    side = summary["side"]
    console.print(f"[bold]{escape(side['text'])}[/bold]: {side['kind']}, arithmetic {escape(side['arithmetic'])}")
    console.print(f"file: {escape(side['path'])}, sha256 {side['sha256'] or 'not known'}")
    for key, value in side["engine"].items():
        console.print(f"  {escape(key)}: {escape(value.strip())}")
    console.print(f"tokens: {len(summary['tokens'])}")
    table = Table("layer", "stages", "output std", "output max |x|", "NaN", "Inf")
    layers = sorted({value["layer"] for value in summary["values"]})
    for layer in layers:
        here = [value for value in summary["values"] if value["layer"] == layer]
        output = next((v for v in here if v["stage"] in (Stage.POST_FFN_RESIDUAL, Stage.LM_HEAD)), None)
        table.add_row(
            "whole" if layer == OUTSIDE else str(layer),
            str(len(here)),
            _number(output, "std"),
            _number(output, "max_abs"),
            str(sum(value["nan"] for value in here)),
            str(sum(value["inf"] for value in here)),
        )
    console.print(table)
    if summary["absent"]:
        console.print(f"unmeasured, since the side does not yield them: {', '.join(summary['absent'])}")
    for name, reason in summary["unvouched"].items():
        console.print(f"not taken: {escape(name)}: {escape(reason)}")
    for sentence in summary["left_out"]:
        console.print(f"not saved: {sentence}")
    if summary["saved"]:
        console.print(f"saved: {escape(summary['saved'])}")


def _number(output: dict[str, Any] | None, key: str) -> str:
    return "-" if output is None or output[key] is None else f"{output[key]:.4g}"
