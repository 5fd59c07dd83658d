"""What `python -m bisect explain` does: open, run an engine or a checkpoint if one is named, explain."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from aprjax.bisect.explain.identity import identify
from aprjax.bisect.explain.report import ExplainReport
from aprjax.bisect.explain.run import MAX_FAULTS, Progress, explain, refused_report
from aprjax.bisect.open_sides import SideLike, live_trace, opened_file, opened_side
from aprjax.bisect.page import write_report as write_folder
from aprjax.bisect.traced import arithmetic_of
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic, preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.text.prompt import encode_prompt, read_prompt_file
from aprjax.trace import AnyTrace
from aprjax.trace.aprt import is_aprt_folder
from aprjax.trace.sides import Side, run_checkpoint


def explain_side(
    side: SideLike,
    file: str | Path | Checkpoint,
    *,
    arithmetic: str | Arithmetic | None = None,
    max_faults: int = MAX_FAULTS,
    force_file: bool = False,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    times: str = "none",
    progress: Progress = lambda what, done, total: None,
) -> ExplainReport:
    """Explains a side by a file; see `aprjax.cli_explain.explain` for the options.

    Raises:
        CheckpointError: the side or the file cannot be read, or the file is not the one that was run.
    """
    enable_compilation_cache()
    checkpoint = opened_file(file)
    if prompt_file is not None:
        prompt = read_prompt_file(prompt_file)
    ids = tokens if prompt is None else encode_prompt(checkpoint, prompt, times)
    named = Path(side) if isinstance(side, str | Path) else None
    folder = named if named is not None and named.is_dir() and is_aprt_folder(named) else None
    try:
        opened = opened_side(side, config=checkpoint.config, tokens=ids)
    except CheckpointError:
        if folder is None:
            raise
        # Nothing vouches for the folder: what it is can still be said.
        found = identify(folder, checkpoint, tokens=ids, progress=progress)
        if not found:
            raise
        return refused_report(folder, checkpoint, found)
    with ExitStack() as stack:
        trace = _trace(opened, ids, arithmetic, stack)
        return explain(
            trace,
            checkpoint,
            _arithmetics(arithmetic, trace),
            max_faults=max_faults,
            # A checkpoint that runs here is another file than the one that should have run: that is the question. Of a
            # folder that says nothing of its file, who names the file vouches for it.
            force_file=force_file or opened.kind == "checkpoint" or not trace.info.sha256,
            folder=folder,
            progress=progress,
        )


def _trace(opened: Side, tokens: list[int] | None, arithmetic: str | Arithmetic | None, stack: ExitStack) -> AnyTrace:
    if opened.kind != "checkpoint" or arithmetic in (None, "auto"):
        return live_trace(opened, tokens, stack)
    checkpoint: Checkpoint | None = opened.checkpoint
    assert checkpoint is not None
    assert arithmetic is not None
    chosen = preset(arithmetic) if isinstance(arithmetic, str) else arithmetic
    return run_checkpoint(checkpoint, opened.require(tokens), chosen)


def _arithmetics(name: str | Arithmetic | None, trace: AnyTrace) -> tuple[Arithmetic, ...]:
    """The asked one; unasked, the trace's own, or all that differ in more than rounding where nothing is known."""
    if name is not None and name != "auto":
        return (preset(name) if isinstance(name, str) else name,)
    own = arithmetic_of(trace) if name is None else None
    if own is not None:
        return (own,)
    return tuple(_distinct().values())


def _distinct() -> dict[tuple[str, str, str], Arithmetic]:
    """Of presets that differ in rounding alone the first: the order of sums is no fault."""
    found: dict[tuple[str, str, str], Arithmetic] = {}
    for known in PRESETS.values():
        if known.dtype == "float32" and not known.exact:
            quantized = "" if known.matmul == "dequantize" else known.activations
            found.setdefault((quantized, known.kv_cache, known.attention), known)
    return found


def write_report(report: ExplainReport, folder: Path) -> Path:
    """Writes `index.html` and `explain.json` into `folder`; returns the page's path.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    return write_folder(report.to_json(), folder)
