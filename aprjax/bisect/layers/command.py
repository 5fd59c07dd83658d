"""What `python -m bisect layers` does: open, tokenize, compare, show, write, and give the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.bisect.asked import asked_prompts, check_destinations, chosen_positions
from aprjax.bisect.counted import counted_progress
from aprjax.bisect.explain.identity_doubts import doubts
from aprjax.bisect.files import compare_files
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.layers.render import print_reports
from aprjax.bisect.lockstep import LayerPair
from aprjax.bisect.open_sides import SideLike, arithmetics, open_two, run_side
from aprjax.bisect.report import SCHEMA, LayersReport, SidedFinding, Verdict
from aprjax.bisect.token_texts import TokenTexts
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, Traced
from aprjax.checkpoint.atomic import atomic_file
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.text.probes import PROBES, Probe
from aprjax.trace import TraceInfo, TraceWriter
from aprjax.trace.capture import EVERYTHING, Capture


def run_layers(
    *,
    model: str,
    ref: str,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    wrap: str = "none",
    arithmetic: str | None = None,
    model_arithmetic: str | None = None,
    ref_arithmetic: str | None = None,
    positions: str = "all",
    json_out: str | None = None,
    report: Path | None = None,
    save_trace: Path | None = None,
    capture: Capture = EVERYTHING,
    probes: tuple[Probe, ...] = PROBES,
) -> int:
    """Runs `layers` as the command line asks; see `aprjax.cli_layers.layers` for the options. Returns the exit code.

    `probes` are run where nothing else is asked for. `capture` is what is kept in saved traces: compared is all.
    """
    check_destinations(json_out, report, save_trace)
    reports = measure_layers(
        model,
        ref,
        prompt=prompt,
        prompt_file=prompt_file,
        tokens=tokens,
        wrap=wrap,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
        save_trace=save_trace,
        capture=capture,
        probes=probes,
    )
    document = combined_json(reports)
    if json_out != "-":
        print_reports(reports)
    if json_out is not None:
        _write_json(document, json_out)
    if report is not None:
        from aprjax.bisect.layers.html import write_report

        index = write_report(reports, document, report)
        print(f"report: {index}", file=sys.stderr)
    return worst(reports).verdict.exit_code


def measure_layers(
    model: SideLike,
    ref: SideLike,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    wrap: str = "none",
    arithmetic: str | Arithmetic | None = None,
    model_arithmetic: str | Arithmetic | None = None,
    ref_arithmetic: str | Arithmetic | None = None,
    positions: str = "all",
    save_trace: Path | None = None,
    capture: Capture = EVERYTHING,
    probes: tuple[Probe, ...] = PROBES,
) -> list[LayersReport]:
    """Opens, tokenizes, runs engines and compares: a report per prompt. The arguments are the command line's.

    Raises:
        CheckpointError: something cannot be read, or cannot be compared.
    """
    enable_compilation_cache()
    sides = open_two(model, ref)
    prompts = asked_prompts(sides, prompt=prompt, prompt_file=prompt_file, tokens=tokens, wrap=wrap, probes=probes)
    with counted_progress() as progress:
        first, second = (side.checkpoint for side in sides)
        files = None
        if first is not None and second is not None:
            files = compare_files(first, second, progress=lambda d, t: progress("comparing the files", d, t))
        run_by = arithmetics(sides, files, both=arithmetic, model=model_arithmetic, ref=ref_arithmetic)
        reports = []
        for asked in prompts:
            chosen = chosen_positions(positions, len(asked.ids))
            with ExitStack() as stack:
                pair = [run_side(s, asked.ids, a, stack) for s, a in zip(sides, run_by, strict=True)]
                doubted = [
                    finding
                    for name, side in zip(("model", "ref"), pair, strict=True)
                    if isinstance(side, Traced)
                    for finding in doubts(side.trace, side.checkpoint, name)
                ]
                sides_now, many = (pair[0], pair[1]), len(prompts) > 1
                observe = _observer(stack, save_trace, sides_now, asked, positions=chosen, capture=capture, many=many)
                found = layers(
                    *pair,
                    tokens=asked,
                    positions=chosen,
                    files=files,
                    progress=lambda what, done, total, name=asked.name: progress(f"{name}: {what}", done, total),
                    observe=observe,
                )
                reports.append(replace(found, findings=(*doubted, *found.findings)))
    if not any((arithmetic, model_arithmetic, ref_arithmetic)) and all(side.runs_here for side in sides):
        reports = [_with_note(report) for report in reports]
    texts = TokenTexts(sides[1].checkpoint, sides[0].checkpoint)
    return [replace(report, token_texts=texts.of(_mentioned(report))) for report in reports]


def _mentioned(report: LayersReport) -> set[int]:
    """The tokens fed, and those that either side would choose."""
    chosen = (token for m in report.margins for side in (m.model, m.ref) for token in (side.top1, side.top2))
    return {*report.prompt.tokens, *chosen}


def worst(reports: list[LayersReport]) -> LayersReport:
    """The report that decides: divergence before unmeasured before near-tie before agreement."""
    order = [Verdict.DIVERGENCE, Verdict.UNMEASURED, Verdict.NEAR_TIE, Verdict.AGREE]
    return min(reports, key=lambda r: order.index(r.verdict))


def combined_json(reports: list[LayersReport]) -> dict[str, Any]:
    """One document: of several prompts, the deciding one's fields, with all of them under `probes`."""
    document = worst(reports).to_json()
    assert document["schema"] == SCHEMA
    if len(reports) > 1:
        document["probes"] = [r.to_json() for r in reports]
    return document


def _with_note(report: LayersReport) -> LayersReport:
    """Says so when the arithmetic was chosen here and is not the engines' own."""
    if report.sides["ref"].arithmetic == "llama.cpp":
        return report
    note = SidedFinding(
        "arithmetic-chosen",
        "info",
        "the files hold other block types, so both sides run decoded, in float32; ask for --arithmetic llama.cpp to "
        "compare what an engine would compute of each",
        side="both",
    )
    return replace(report, findings=(*report.findings, note))


def _observer(
    stack: ExitStack,
    path: Path | None,
    pair: tuple[Side, Side],
    asked: TokensReport,
    *,
    positions: tuple[int, ...],
    capture: Capture,
    many: bool,
) -> Callable[[LayerPair], None]:
    """Writes both sides' traces beside each other: `FILE.model.safetensors` and `FILE.ref.safetensors`."""
    if path is None:
        return lambda pair: None
    from aprjax.trace.trace import this_platform

    stem = path.with_suffix("") if path.suffix == ".safetensors" else path
    label = f".{asked.name}" if many else ""
    writers = {}
    for name, side in zip(("model", "ref"), pair, strict=True):
        if isinstance(side, Traced):
            info = replace(side.trace.info, head_positions=positions)
            layers = 1 + max((layer for layer, _ in side.trace), default=0)
        else:
            info = TraceInfo(
                path=str(side.checkpoint.path),
                sha256=side.checkpoint.sha256(),
                format=side.checkpoint.format,
                arithmetic=side.arithmetic.name,
                tokens=asked.ids,
                positions=tuple(range(len(asked.ids))),
                head_positions=positions,
                platform=this_platform(),
            )
            layers = side.checkpoint.config.num_layers
        target = stem.with_name(f"{stem.name}{label}.{name}.safetensors")
        writers[name] = stack.enter_context(TraceWriter(target, info, layers=layers))

    def observe(pair: LayerPair) -> None:
        for side, values in (("model", pair.model), ("ref", pair.ref)):
            for stage in (stage for stage in values if capture.wants(pair.layer, stage)):
                batched = pair.layer == OUTSIDE and stage is not Stage.EMBEDDING
                writers[side].write(pair.layer, stage, values[stage], total_rows=len(positions) if batched else None)

    return observe


def _write_json(document: dict[str, Any], destination: str) -> None:
    text = json.dumps(document, indent=1, allow_nan=False, default=_plain) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with atomic_file(destination) as stream:
        stream.write(text.encode())


def _plain(value: Any) -> Any:
    """NumPy scalars as plain ones; anything else has no business in a report."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
