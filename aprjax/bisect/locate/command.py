"""What `python -m bisect locate` does: open, tokenize, locate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from aprjax.bisect.asked import asked_prompts, check_destinations, chosen_positions
from aprjax.bisect.counted import counted_progress
from aprjax.bisect.files import compare_files
from aprjax.bisect.locate.report import LocateReport
from aprjax.bisect.locate.run import locate
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.open_sides import arithmetics, open_two, run_side
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.compilation import enable_compilation_cache


def locate_sides(
    model: str,
    ref: str,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    wrap: str = "none",
    arithmetic: str | None = None,
    model_arithmetic: str | None = None,
    ref_arithmetic: str | None = None,
    positions: str = "last",
    json_out: str | None = None,
) -> LocateReport:
    """Locates on one prompt (unasked, the first probe); see `aprjax.cli_locate` for the options.

    Raises:
        CheckpointError: a side cannot be read or run, or the model's side is a recorded trace or an engine.
    """
    check_destinations(json_out)
    enable_compilation_cache()
    sides = open_two(model, ref)
    if not sides[0].runs_here:
        raise CheckpointError(
            "the model's side has to be run with values put in, and this one is a trace or another engine",
            file=sides[0].side.path,
            fix="give the trace or engine as --ref, and a checkpoint as --model",
        )
    asked = asked_prompts(sides, prompt=prompt, prompt_file=prompt_file, tokens=tokens, wrap=wrap)[0]
    with counted_progress() as progress, ExitStack() as stack:
        first, second = (side.checkpoint for side in sides)
        files = None
        if first is not None and second is not None:
            files = compare_files(first, second, progress=lambda d, t: progress("comparing the files", d, t))
        run_by = arithmetics(sides, files, both=arithmetic, model=model_arithmetic, ref=ref_arithmetic)
        pair = [run_side(side, asked.ids, chosen, stack) for side, chosen in zip(sides, run_by, strict=True)]
        assert isinstance(pair[0], Runner)
        return locate(
            pair[0],
            pair[1],
            tokens=asked,
            positions=chosen_positions(positions, len(asked.ids)),
            files=files,
            progress=progress,
        )
