"""The questions about two sides: what each command of the command line does, as one call that returns its report.

`aprjax.layers(model, ref, "What is 2+2?")` is `python -m aprjax layers --model … --ref … --prompt …`; all of them are
there as `aprjax.NAME`; those about one side are in `aprjax.questions_of_one`.

A *side* is what the command line takes (a path, `llama.cpp:FILE.gguf`, a saved trace, …), or an opened `Checkpoint`, or
a trace in memory. An *arithmetic* is a preset's name or an `Arithmetic` of one's own. Every call is about one prompt: a
text, or token ids; where none is given, a recorded trace's own tokens, else the first probe. Nothing is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from aprjax.bisect.asked_pair import Question
    from aprjax.bisect.attribute.report import AttributeReport
    from aprjax.bisect.chatml.report import ChatmlReport
    from aprjax.bisect.files.report import FilesComparison
    from aprjax.bisect.generate.report import GenerateReport
    from aprjax.bisect.locate.report import LocateReport
    from aprjax.bisect.margins.report import MarginsReport
    from aprjax.bisect.open_sides import SideLike
    from aprjax.bisect.report import LayersReport
    from aprjax.bisect.tokens.report import TokensComparison
    from aprjax.checkpoint.types import Checkpoint
    from aprjax.qwen2.arithmetic import Arithmetic

    FileLike = str | Path | Checkpoint
    ArithmeticLike = str | Arithmetic

Wrapped = Literal["none", "once", "twice"]


def files(model: FileLike, ref: FileLike, *, decode: bool = False) -> FilesComparison:
    """Compares two files without running them, and says what turns each differing tensor into the other.

    Args:
        model: the file to judge.
        ref: the file to judge it by.
        decode: decode both sides of every tensor, even where the bytes are equal.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from aprjax.bisect.files.command import static_comparison
    from aprjax.bisect.open_sides import opened_file

    return static_comparison(opened_file(model), opened_file(ref), decode=decode)


def tokens(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    engine: bool = True,
) -> TokensComparison:
    """Compares what two sides are fed: token ids, special and stop tokens, chat templates.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompt: text to feed (all probes where nothing is given); or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        engine: also ask llama.cpp about each GGUF file, if it is installed.

    Raises:
        CheckpointError: a side cannot be read.
    """
    from aprjax.bisect.open_sides import open_two
    from aprjax.bisect.tokens.compare import compare_tokens

    return compare_tokens(open_two(model, ref), text=prompt, times=wrap, ids=_listed(tokens), engine=engine)


def layers(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    model_arithmetic: ArithmeticLike | None = None,
    ref_arithmetic: ArithmeticLike | None = None,
    positions: str = "all",
) -> LayersReport:
    """Finds the first layer and stage at which two sides part, and why.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: of both sides; or
        model_arithmetic: of the one,
        ref_arithmetic: and of the other.
        positions: `last`, `all` or `A..B`.

    Raises:
        CheckpointError: a side cannot be read or run, or the two cannot be compared.
    """
    from aprjax.bisect.layers.command import measure_layers
    from aprjax.text.probes import PROBES

    return measure_layers(
        model,
        ref,
        prompt=prompt,
        tokens=_listed(tokens),
        wrap=wrap,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
        probes=PROBES[:1],
    )[0]


def locate(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    model_arithmetic: ArithmeticLike | None = None,
    ref_arithmetic: ArithmeticLike | None = None,
    positions: str = "last",
) -> LocateReport:
    """Proves which places cause a drift, by putting the reference's values into the model and the reverse.

    Args:
        model: a checkpoint, which is run with values put in.
        ref: the side whose values are put in.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: of both sides; or
        model_arithmetic: of the one,
        ref_arithmetic: and of the other.
        positions: `last`, `all` or `A..B`.

    Raises:
        CheckpointError: a side cannot be read or run.
    """
    from aprjax.bisect.locate.command import locate_sides

    return locate_sides(
        model, ref, _question(prompt, tokens, wrap, arithmetic, model_arithmetic, ref_arithmetic, positions)
    )


def attribute(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    model_arithmetic: ArithmeticLike | None = None,
    ref_arithmetic: ArithmeticLike | None = None,
    positions: str = "last",
    metric: Literal["margin", "kl"] = "margin",
    steps: int = 8,
    verify: int = 5,
    base: Literal["float32", "float64"] = "float32",
) -> AttributeReport:
    """Shares out a margin's change over stages, tensors, config keys and choices of the arithmetic, by gradients.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: of both sides; or
        model_arithmetic: of the one,
        ref_arithmetic: and of the other.
        positions: `last`, `all` or `A..B`.
        metric: what is attributed, averaged over the positions.
        steps: gradients along the path from the reference to the model.
        verify: shares to check by two real runs each.
        base: float type of the network that gradients are taken of.

    Raises:
        CheckpointError: a side cannot be read or run.
    """
    from aprjax.bisect.attribute.command import attribute_sides

    question = _question(prompt, tokens, wrap, arithmetic, model_arithmetic, ref_arithmetic, positions)
    return attribute_sides(model, ref, question, kind=metric, steps=steps, verify=verify, base=base)


def margins(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    continuation: str | None = None,
    generate: int = 0,
    arithmetic: ArithmeticLike | None = None,
    model_arithmetic: ArithmeticLike | None = None,
    ref_arithmetic: ArithmeticLike | None = None,
    positions: str = "all",
    noise: bool = True,
) -> MarginsReport:
    """Compares both sides' choices of the next token at every position: margins, flips, KL, and what noise explains.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: of both sides; or
        model_arithmetic: of the one,
        ref_arithmetic: and of the other.
        positions: `last`, `all` or `A..B`.
        continuation: a text that follows the prompt.
        generate: so many tokens follow that the reference chooses.
        noise: measure the noise floor.

    Raises:
        CheckpointError: a side cannot be read or run.
    """
    from aprjax.bisect.margins.command import Continuation, run_margins
    from aprjax.text.probes import PROBES

    return run_margins(
        model=model,
        ref=ref,
        prompt=prompt,
        tokens=_listed(tokens),
        wrap=wrap,
        continuation=Continuation(continuation, None, generate),
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        positions=positions,
        with_noise=noise,
        probes=PROBES[:1],
    )[0]


def generate(
    model: SideLike,
    ref: SideLike,
    prompt: str | None = None,
    *,
    max_new_tokens: int = 128,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    model_arithmetic: ArithmeticLike | None = None,
    ref_arithmetic: ArithmeticLike | None = None,
    ignore_stop: bool = False,
) -> GenerateReport:
    """Compares what two sides say: greedy continuations, where they part, and whether noise explains it.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: of both sides; or
        model_arithmetic: of the one,
        ref_arithmetic: and of the other.
        max_new_tokens: how far.
        ignore_stop: go on after tokens that end an answer.

    Raises:
        CheckpointError: a side cannot be read, or cannot generate.
    """
    from aprjax.bisect.generate.command import run_generate
    from aprjax.text.probes import PROBES

    return run_generate(
        model=model,
        ref=ref,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        tokens=_listed(tokens),
        wrap=wrap,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        ignore_stop=ignore_stop,
        probes=PROBES[:1],
    )[0]


def chatml(
    model: FileLike,
    ref: FileLike,
    prompts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    wraps: Sequence[Wrapped] = ("none", "once", "twice"),
    arithmetics: Sequence[str] = ("float32", "llama.cpp", "realizar"),
    max_new_tokens: int = 32,
    noise: bool = True,
    state: Path | None = None,
) -> ChatmlReport:
    """Settles why ChatML goes bad: wraps, stop tokens, special tokens, arithmetics and files, each varied alone.

    Args:
        model: the file to judge.
        ref: the file to judge it by.
        prompts: texts, or by text the substrings of which a right answer holds one; upstream's where there are none.
        wraps: how often each prompt is wrapped.
        arithmetics: presets' names.
        max_new_tokens: of every continuation.
        noise: measure the noise floor where a token flips.
        state: folder of finished runs; None to keep none.

    Raises:
        CheckpointError: a file cannot be read or run.
    """
    from aprjax.bisect.chatml.command import Asked, run_chatml
    from aprjax.bisect.chatml.prompts import UPSTREAM_PROMPTS, own_prompt
    from aprjax.bisect.open_sides import opened_file

    # Cells go by the prompts' names.
    expected = prompts if isinstance(prompts, Mapping) else dict.fromkeys(prompts or (), ())
    own = [replace(own_prompt(text), name=text, expected=tuple(found)) for text, found in expected.items()]
    chosen = UPSTREAM_PROMPTS if prompts is None else own
    asked = Asked(chosen, wraps, arithmetics, max_new_tokens, noise=noise)
    return run_chatml(opened_file(model), opened_file(ref), asked, state=state)


def _listed(tokens: Sequence[int] | None) -> list[int] | None:
    return None if tokens is None else list(tokens)


def _question(  # noqa: PLR0917 - in the order of `Question`
    prompt: str | None,
    tokens: Sequence[int] | None,
    wrap: str,
    both: ArithmeticLike | None,
    model: ArithmeticLike | None,
    ref: ArithmeticLike | None,
    positions: str,
) -> Question:
    from aprjax.bisect.asked_pair import Question

    return Question(
        prompt=prompt,
        tokens=_listed(tokens),
        wrap=wrap,
        arithmetic=both,
        model_arithmetic=model,
        ref_arithmetic=ref,
        positions=positions,
    )
