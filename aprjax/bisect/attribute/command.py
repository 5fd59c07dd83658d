"""What `python -m bisect attribute` does: open, tokenize, run engines, attribute."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from aprjax.bisect.asked import asked_prompts, check_destinations, chosen_positions
from aprjax.bisect.attribute.metric import Kind
from aprjax.bisect.attribute.render import write_waterfall
from aprjax.bisect.attribute.report import AttributeReport
from aprjax.bisect.attribute.run import attribute
from aprjax.bisect.counted import counted_progress
from aprjax.bisect.files import compare_files
from aprjax.bisect.open_sides import arithmetics, open_two, run_side
from aprjax.checkpoint.atomic import atomic_file
from aprjax.qwen2.compilation import enable_compilation_cache


def attribute_sides(
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
    kind: Kind = "margin",
    steps: int = 8,
    verify: int = 5,
    base: str = "float32",
    json_out: str | None = None,
    report: Path | None = None,
) -> AttributeReport:
    """Attributes on one prompt (unasked, the first probe); see `aprjax.cli_attribute` for the options.

    Raises:
        CheckpointError: a side cannot be read or run, or an output cannot be written.
    """
    check_destinations(json_out, report)
    enable_compilation_cache()
    sides = open_two(model, ref)
    asked = asked_prompts(sides, prompt=prompt, prompt_file=prompt_file, tokens=tokens, wrap=wrap)[0]
    with counted_progress() as progress, ExitStack() as stack:
        first, second = (side.checkpoint for side in sides)
        files = None
        if first is not None and second is not None:
            files = compare_files(first, second, progress=lambda d, t: progress("comparing the files", d, t))
        run_by = arithmetics(sides, files, both=arithmetic, model=model_arithmetic, ref=ref_arithmetic)
        pair = [run_side(side, asked.ids, chosen, stack) for side, chosen in zip(sides, run_by, strict=True)]
        found = attribute(
            pair[0],
            pair[1],
            tokens=asked,
            positions=chosen_positions(positions, len(asked.ids)),
            files=files,
            kind=kind,
            steps=steps,
            verify=verify,
            dtype=base,
            progress=progress,
        )
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        with atomic_file(report / "attribute.json") as stream:
            stream.write((json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n").encode())
        write_waterfall(found, report / "waterfall.png")
    return found
