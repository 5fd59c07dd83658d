"""Two sides opened, given one prompt and run as far as engines have to be: what the patching questions start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aprjax.bisect.asked import asked_prompts, chosen_positions
from aprjax.bisect.counted import Progress, counted_progress
from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.open_sides import Opened, SideLike, arithmetics, open_two, run_side
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side
from aprjax.checkpoint.types import UnmeasurableError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.compilation import enable_compilation_cache


@dataclass(frozen=True)
class Question:
    """What a two-sided command was asked, as its options have it.

    Attributes:
        prompt, prompt_file, tokens: one of them, or none for a trace's own tokens or the first probe.
        wrap: how often the prompt is wrapped.
        arithmetic: of both sides; or of either by `model_arithmetic` and `ref_arithmetic`.
        positions: `last`, `all` or `A..B`.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    tokens: list[int] | None = None
    wrap: str = "none"
    arithmetic: str | Arithmetic | None = None
    model_arithmetic: str | Arithmetic | None = None
    ref_arithmetic: str | Arithmetic | None = None
    positions: str = "last"


@dataclass(frozen=True)
class AskedPair:
    """Both sides, what they are fed, and how their files compare (None where a trace's file is not at hand)."""

    model: Side
    ref: Side
    tokens: TokensReport
    positions: tuple[int, ...]
    files: FilesReport | None
    progress: Progress


def open_sides_of(model: SideLike, ref: SideLike) -> tuple[Opened, Opened]:
    """Opens both sides, with the cache of compiled programs in use.

    Raises:
        CheckpointError: a side cannot be read.
    """
    enable_compilation_cache()
    return open_two(model, ref)


@contextmanager
def asked_pair(sides: tuple[Opened, Opened], question: Question) -> Iterator[AskedPair]:
    """Tokenizes, compares the files and runs what is an engine; an engine's trace goes when the block ends.

    Raises:
        CheckpointError: an engine failed, a prompt cannot be read, or positions lie beyond it.
        UnmeasurableError: the two tokenizers make other tokens of the prompt.
    """
    asked = asked_prompts(
        sides,
        prompt=question.prompt,
        prompt_file=question.prompt_file,
        tokens=question.tokens,
        wrap=question.wrap,
    )[0]
    if not asked.agree:
        raise UnmeasurableError(
            asked.reason,
            fix="give --tokens to feed both sides the same ids; `python -m aprjax tokens` says why they differ",
        )
    positions = chosen_positions(question.positions, len(asked.ids))
    with counted_progress() as progress, ExitStack() as stack:
        first, second = (side.checkpoint for side in sides)
        files = None
        if first is not None and second is not None:
            files = compare_files(first, second, progress=lambda d, t: progress("comparing the files", d, t))
        run_by = arithmetics(
            sides,
            files,
            both=question.arithmetic,
            model=question.model_arithmetic,
            ref=question.ref_arithmetic,
        )
        pair = [run_side(side, asked.ids, chosen, stack) for side, chosen in zip(sides, run_by, strict=True)]
        yield AskedPair(pair[0], pair[1], asked, positions, files, progress)
