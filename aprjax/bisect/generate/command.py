"""What `python -m bisect generate` does before it prints: open, tokenize, decode, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprjax.bisect.asked import asked_prompts, check_destinations
from aprjax.bisect.counted import Progress, counted_progress
from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.generate.compare import generate
from aprjax.bisect.generate.report import GenerateReport
from aprjax.bisect.generate.sides import Generator, LlamaGenerator, LocalGenerator, require_room
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.noise.logits import LogitNoise, measure_logit_noise
from aprjax.bisect.open_sides import Opened, SideLike, arithmetics, open_two
from aprjax.bisect.report import SidedFinding, Verdict, sided
from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.loading import require_runnable
from aprjax.text.probes import PROBES, Probe


def run_generate(
    *,
    model: SideLike,
    ref: SideLike,
    max_new_tokens: int,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    wrap: str = "none",
    arithmetic: str | Arithmetic | None = None,
    model_arithmetic: str | Arithmetic | None = None,
    ref_arithmetic: str | Arithmetic | None = None,
    ignore_stop: bool = False,
    step_by_step: bool = False,
    json_out: str | None = None,
    report: Path | None = None,
    probes: tuple[Probe, ...] = PROBES,
) -> list[GenerateReport]:
    """Runs `generate` as the command line asks; see `aprjax.cli_generate` for the options. A report per prompt.

    `probes` are run where nothing else is asked for.

    Raises:
        CheckpointError: a side cannot be read or cannot generate, the prompt does not fit, an engine failed, or
            `json_out` and `report`, where the results are to go, could not be written.
    """
    check_destinations(json_out, report)
    enable_compilation_cache()
    sides = open_two(model, ref)
    for side in sides:
        require_generator(side)
    prompts = asked_prompts(sides, prompt=prompt, prompt_file=prompt_file, tokens=tokens, wrap=wrap, probes=probes)
    checkpoints = [_file(side) for side in sides]
    for checkpoint in checkpoints:
        require_runnable(checkpoint)
        for asked in prompts:
            require_room(checkpoint, asked.ids, max_new_tokens)
    with counted_progress() as progress:
        files = compare_files(*checkpoints, progress=lambda d, t: progress("comparing the files", d, t))
        run_by = arithmetics(sides, files, both=arithmetic, model=model_arithmetic, ref=ref_arithmetic)
        pair, shared = generators(sides, run_by, files, progress)

        def noise(fed: tuple[int, ...], positions: tuple[int, ...]) -> LogitNoise:
            runners = [Runner(side.checkpoint, side.arithmetic) for side in pair]
            return measure_logit_noise(runners[0], runners[1], fed, positions, progress=progress)

        findings = _findings(sides, files)
        return [
            generate(
                *pair,
                tokens=asked,
                max_new_tokens=max_new_tokens,
                ignore_stop=ignore_stop,
                step_by_step=step_by_step,
                shared=shared,
                findings=findings,
                measure_noise=noise,
            )
            for asked in prompts
        ]


def require_generator(side: Opened) -> None:
    """Checks that a side can decode further than what is at hand.

    Raises:
        CheckpointError: it is a recorded trace, or an engine that aprjax does not generate with.
    """
    kind = side.side.kind
    if kind in ("checkpoint", "llama.cpp"):
        return
    what = (
        "transformers is traced, not decoded with" if kind == "hf" else "a recorded trace holds one run and ends there"
    )
    raise CheckpointError(
        f"this side cannot generate: {what}",
        file=side.side.path,
        fix="give a checkpoint or llama.cpp:FILE.gguf; `layers` and `replay` take traces",
    )


def _file(side: Opened) -> Checkpoint:
    assert side.checkpoint is not None  # `require_generator` leaves no other
    return side.checkpoint


def generators(
    sides: tuple[Opened, Opened],
    run_by: tuple[Arithmetic | None, Arithmetic | None],
    files: FilesReport,
    progress: Progress,
) -> tuple[tuple[Generator, Generator], str]:
    """Both sides ready to decode, and why one computation serves both (empty where it does not)."""
    same_bytes = not files.tensors and all(finding.severity != "error" for finding in files.findings())
    made: list[Generator] = []
    # The reference first: it decodes first, and the model may use its weights.
    for name, side, arithmetic in (("ref", sides[1], run_by[1]), ("model", sides[0], run_by[0])):
        assert arithmetic is not None  # only recorded traces leave it open

        def told(what: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {what}", done, total)

        checkpoint = _file(side)
        if side.side.kind == "llama.cpp":
            made.append(LlamaGenerator(checkpoint, arithmetic, side.side.options, told))
            continue
        other = made[0] if made and same_bytes else None
        twin = other if isinstance(other, LocalGenerator) else None
        made.append(LocalGenerator(checkpoint, arithmetic, told, twin))
    ref, model = made
    alike = isinstance(model, LocalGenerator) and isinstance(ref, LocalGenerator) and model.arithmetic == ref.arithmetic
    shared = (
        "the same bytes under the same arithmetic: one computation serves both sides" if same_bytes and alike else ""
    )
    return (model, ref), shared


def _findings(sides: tuple[Opened, Opened], files: FilesReport) -> list[SidedFinding]:
    about = [Finding("files-compared", "info", files.sentence()), *files.findings()]
    found = [sided(finding, "both") for finding in about]
    for name, side in zip(("model", "ref"), sides, strict=True):
        found += [sided(finding, name) for finding in _file(side).findings]
    return found


def worst(reports: list[GenerateReport]) -> GenerateReport:
    """The report that decides: divergence before unmeasured before near-tie before agreement."""
    order = [Verdict.DIVERGENCE, Verdict.UNMEASURED, Verdict.NEAR_TIE, Verdict.AGREE]
    return min(reports, key=lambda report: order.index(report.verdict))


def combined_json(reports: list[GenerateReport]) -> dict[str, Any]:
    """One document: of several prompts, the deciding one's fields, with all of them under `probes`."""
    document = worst(reports).to_json()
    if len(reports) > 1:
        document["probes"] = [report.to_json() for report in reports]
    return document
