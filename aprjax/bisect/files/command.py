"""What `python -m bisect files` does: open two checkpoints, compare them, and say what it comes to."""

from __future__ import annotations

import re
import time
from pathlib import Path

from aprjax.bisect.asked import check_destinations
from aprjax.bisect.counted import Progress, counted_progress
from aprjax.bisect.files.compare import compare_files
from aprjax.bisect.files.report import FileInfo, FilesComparison, FilesReport, causes
from aprjax.bisect.report import SidedFinding, Verdict, sided
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint, CheckpointError

_ENGINE = re.compile(r"llama\.cpp(\[[^\]]*\])?:(?P<file>.+)", re.DOTALL)


def compare_two_files(
    model: str, ref: str, *, decode: bool = False, json_out: str | None = None, report: Path | None = None
) -> FilesComparison:
    """Compares two files; see `aprjax.cli_static` for the options.

    Raises:
        CheckpointError: a side is no checkpoint, or cannot be read.
    """
    check_destinations(json_out, report)
    sides = open_file(model), open_file(ref)
    with counted_progress() as progress:
        found = static_comparison(*sides, decode=decode, progress=progress)
    if report is not None:
        from aprjax.bisect.files.html import write_report

        write_report(found, report)
    return found


def open_file(text: str) -> Checkpoint:
    """The checkpoint that a side names; of `llama.cpp:FILE` the file, which is what the engine reads.

    Raises:
        CheckpointError: it names a trace or an engine without a file of its own, or cannot be read.
    """
    engine = _ENGINE.fullmatch(text)
    if engine is not None:
        return open_checkpoint(Path(engine["file"]))
    if text.startswith("hf:"):
        return open_checkpoint(Path(text.removeprefix("hf:")))
    path = Path(text)
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        if not _is_trace(text):
            raise
        raise CheckpointError(
            "a trace holds what a model computed, not its weights: there is nothing to compare file by file",
            file=path,
            fix="give the file that it was made from; `layers` compares traces",
        ) from error


def _is_trace(text: str) -> bool:
    from aprjax.trace.sides import open_side

    try:
        return open_side(text).recorded is not None
    except (CheckpointError, OSError):
        return False


def static_comparison(
    model: Checkpoint,
    ref: Checkpoint,
    *,
    decode: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> FilesComparison:
    """Config, inventory, bytes and values of two checkpoints, and what explains the differences."""
    start = time.perf_counter()
    files = compare_files(model, ref, decode=decode, progress=lambda d, t: progress("comparing the tensors", d, t))
    compared = time.perf_counter()
    progress("digests", 0, 1)
    sides = {"model": FileInfo.of(model), "ref": FileInfo.of(ref)}
    explained = causes(files.tensors)
    verdict, reason = _verdict(files)
    found = [sided(finding, "both") for finding in files.findings()]
    found += _text_findings(model, ref)
    for name, side in (("model", model), ("ref", ref)):
        found += [sided(finding, name) for finding in side.findings]
    return FilesComparison(
        verdict=verdict,
        reason=reason,
        sides=sides,
        files=files,
        causes=explained,
        findings=tuple(found),
        seconds={"compare": compared - start, "digests": time.perf_counter() - compared},
    )


def _verdict(files: FilesReport) -> tuple[Verdict, str]:
    if files.dimensions:
        keys = ", ".join(f"{key} ({a} and {b})" for key, (a, b) in files.dimensions.items())
        return Verdict.UNMEASURED, f"the two are models of other dimensions: {keys}"
    if files.differing or files.active_config:
        return Verdict.DIVERGENCE, files.sentence()
    return Verdict.AGREE, files.sentence()


def _text_findings(model: Checkpoint, ref: Checkpoint) -> list[SidedFinding]:
    """Vocabularies and templates, as far as equality goes: `tokens` says what a difference means."""
    hint = "`python -m bisect tokens` says what it means"
    found = []
    pair = model.vocabulary, ref.vocabulary
    if pair[0] is None or pair[1] is None:
        if pair[0] is not pair[1]:
            side = "model" if pair[0] is None else "ref"
            found.append(SidedFinding("vocabulary-missing", "warning", "the file has no vocabulary", side=side))
    else:
        for what in ("tokens", "merges"):
            ours, theirs = (getattr(vocabulary, what) for vocabulary in pair)
            if ours != theirs:
                text = f"{what} of the vocabulary differ ({len(ours)} and {len(theirs)}); {hint}"
                found.append(SidedFinding("vocabulary-differs", "warning", text, side="both"))
    if model.chat_template != ref.chat_template and None not in (model.chat_template, ref.chat_template):
        found.append(SidedFinding("template-differs", "warning", f"the chat templates differ; {hint}", side="both"))
    return found
