"""What `python -m bisect margins` does before it shows and writes: open, tokenize, continue, compare."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprjax.bisect.asked import asked_prompts, check_destinations, chosen_positions
from aprjax.bisect.counted import Progress, counted_progress
from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.generate.sides import LlamaGenerator, LocalGenerator
from aprjax.bisect.margins.pair import AnySide, compare_margins
from aprjax.bisect.margins.report import SCHEMA, FedTokens, MarginsReport
from aprjax.bisect.open_sides import Opened, SideLike, arithmetics, open_two, run_side
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport, tokenize_both
from aprjax.bisect.traced import Side, Traced
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.stages import Stage
from aprjax.text.probes import PROBES, Probe
from aprjax.text.prompt import read_prompt_file
from aprjax.trace.llama_cpp import save_llama_cpp

Sides = tuple[Opened, Opened]
RunBy = tuple[Arithmetic | None, Arithmetic | None]


@dataclass(frozen=True)
class Continuation:
    """What follows the prompt; at most one of the three is given.

    Attributes:
        text: as text.
        tokens: as ids.
        count: so many tokens that the reference chooses, greedily.
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    count: int = 0

    @property
    def given(self) -> bool:
        """Whether there is one at all."""
        return self.text is not None or self.tokens is not None or self.count > 0


def run_margins(
    *,
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    wrap: str = "none",
    continuation: Continuation | None = None,
    text_file: Path | None = None,
    context: int = 512,
    arithmetic: str | Arithmetic | None = None,
    model_arithmetic: str | Arithmetic | None = None,
    ref_arithmetic: str | Arithmetic | None = None,
    positions: str = "all",
    with_noise: bool = True,
    json_out: str | None = None,
    report: Path | None = None,
    probes: tuple[Probe, ...] = PROBES,
) -> list[MarginsReport]:
    """Runs `margins` as the command line asks; see `aprjax.cli_margins` for the options.

    `json_out` and `report` are only checked here: that they can be written when the work is done. `probes` are run
    where nothing else is asked for.

    Raises:
        CheckpointError: something cannot be read, or cannot be compared.
    """
    check_destinations(json_out, report)
    enable_compilation_cache()
    sides = open_two(model, ref)
    if text_file is not None:
        prompts = [_text(sides, text_file)]
    else:
        prompts = asked_prompts(sides, prompt=prompt, prompt_file=prompt_file, tokens=tokens, wrap=wrap, probes=probes)
    with counted_progress() as progress:
        files = _files(sides, progress)
        run_by = arithmetics(sides, files, both=arithmetic, model=model_arithmetic, ref=ref_arithmetic)
        reports = []
        for asked in prompts:

            def told(what: str, done: int, total: int, name: str = asked.name) -> None:
                progress(f"{name}: {what}", done, total)

            fed, agreed = _fed(sides, run_by, asked, continuation or Continuation(), told)
            if text_file is not None:
                fed = FedTokens(asked.name, str(text_file), "none", asked.ids, context=context)
            with ExitStack() as stack:
                pair = [_side(side, by, stack) for side, by in zip(sides, run_by, strict=True)]
                reports.append(
                    compare_margins(
                        *pair,
                        fed=fed,
                        tokens=agreed,
                        positions=None if text_file is not None else _positions(sides, positions, len(fed.ids)),
                        files=files,
                        with_noise=with_noise,
                        progress=told,
                    )
                )
    return reports


def worst(reports: list[MarginsReport]) -> MarginsReport:
    """The report that decides: divergence before unmeasured before near-tie before agreement."""
    order = [Verdict.DIVERGENCE, Verdict.UNMEASURED, Verdict.NEAR_TIE, Verdict.AGREE]
    return min(reports, key=lambda report: order.index(report.verdict))


def combined_json(reports: list[MarginsReport]) -> dict[str, Any]:
    """One document: of several prompts, the deciding one's fields, with all of them under `probes`."""
    document = worst(reports).to_json()
    assert document["schema"] == SCHEMA
    if len(reports) > 1:
        document["probes"] = [report.to_json() for report in reports]
    return document


def _files(sides: Sides, progress: Progress) -> FilesReport | None:
    first, second = (side.checkpoint for side in sides)
    if first is None or second is None:
        return None
    return compare_files(first, second, progress=lambda d, t: progress("comparing the files", d, t))


def _text(sides: Sides, path: Path) -> TokensReport:
    """The tokens of a text file."""
    model, ref = _known(sides)
    if any(side.tokens is not None for side in sides):
        raise CheckpointError(
            "a recorded trace has its own tokens: a text cannot be fed to it", file=path, fix="leave --text-file out"
        )
    return tokenize_both(model, ref, name="text", text=read_prompt_file(path), times="none")


def _known(sides: Sides) -> tuple[Checkpoint, Checkpoint]:
    known = [side.checkpoint for side in sides if side.checkpoint is not None]
    if not known:
        raise CheckpointError(
            "a text, and no file whose tokenizer could encode it", fix="give the text as token ids, or a file as a side"
        )
    return known[0], known[-1]


def _fed(
    sides: Sides, run_by: RunBy, asked: TokensReport, continuation: Continuation, progress: Progress
) -> tuple[FedTokens, TokensReport]:
    """The prompt with its continuation, and whether both tokenizers agree on both."""
    ids, source, agreed = (), "", asked
    recorded = next((side for side in sides if side.tokens is not None), None)
    if recorded is not None and continuation.given:
        raise CheckpointError(
            "a recorded trace has its own tokens: nothing can be added to them",
            file=recorded.side.path,
            fix="leave the continuation out, or give the engine or the file itself as a side",
        )
    if continuation.text is not None:
        encoded = tokenize_both(*_known(sides), name="continuation", text=continuation.text, times="none")
        ids, source = encoded.ids, "given as text"
        agreed = asked if encoded.agree else encoded
    elif continuation.tokens is not None:
        ids, source = continuation.tokens, "given as tokens"
    elif continuation.count:
        ids, source = _generated(sides[1], run_by[1], asked.ids, continuation.count, progress), "the reference's own"
    return FedTokens(asked.name, asked.text, asked.wrap, asked.ids, tuple(ids), source), agreed


def _generated(
    ref: Opened, arithmetic: Arithmetic | None, prompt: tuple[int, ...], count: int, progress: Progress
) -> tuple[int, ...]:
    """The reference's greedy continuation, its stop token included."""
    checkpoint, by = ref.checkpoint, arithmetic or preset("llama.cpp")
    if checkpoint is None or ref.side.kind not in ("checkpoint", "llama.cpp"):
        raise CheckpointError(
            f"{ref.side.text} does not generate here",
            file=ref.side.path,
            fix="give what it wrote: --continuation TEXT or --continuation-tokens IDS",
        )
    room = checkpoint.config.max_position_embeddings - len(prompt)
    if room < count:
        raise CheckpointError(
            f"{len(prompt)} prompt tokens and {count} more exceed the model's context of "
            f"{checkpoint.config.max_position_embeddings}",
            file=checkpoint.path,
            fix=f"ask for --generate {room} or fewer" if room > 0 else "shorten the prompt",
        )
    if ref.runs_here:
        generator = LocalGenerator(checkpoint, by, progress)
    else:
        generator = LlamaGenerator(checkpoint, by, ref.side.options, progress)
    return generator.generate(prompt, count, ignore_stop=False).tokens


def _side(opened: Opened, by: Arithmetic | None, stack: ExitStack) -> AnySide:
    """The side, or what yields it for a piece's tokens: an engine runs when its tokens are known."""
    if opened.runs_here or opened.side.recorded is not None:
        return run_side(opened, (), by, stack)

    def run(tokens: tuple[int, ...]) -> Side:
        if opened.side.kind != "llama.cpp" or by is None:
            return run_side(opened, tokens, by, stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aprjax-")))
        target, wanted = folder / "logits.safetensors", (Stage.LM_HEAD,)
        saved = save_llama_cpp(opened.side.path, list(tokens), target, opened.side.options, stages=wanted)
        return Traced(saved, opened.checkpoint, by)

    return run


def _positions(sides: Sides, text: str, count: int) -> tuple[int, ...]:
    """The compared positions; all means those that recorded traces have."""
    chosen = chosen_positions(text, count)
    recorded = [side.side.recorded for side in sides if side.side.recorded is not None]
    if text != "all" or not recorded:
        return chosen
    common = [set(trace.info.head_positions) for trace in recorded]
    return tuple(position for position in chosen if all(position in held for held in common))
