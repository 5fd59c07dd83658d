"""The questions about one side: what it computes, and whether its file explains that; see `aprjax.questions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprjax.bisect.explain.report import ExplainReport
    from aprjax.bisect.noise.report import NoiseReport
    from aprjax.bisect.open_sides import SideLike
    from aprjax.bisect.replay.report import ReplayReport
    from aprjax.questions import ArithmeticLike, FileLike, Wrapped
    from aprjax.trace import AnyTrace


def capture(
    side: SideLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
) -> AnyTrace:
    """What a side computes at every stage, in memory: `trace[layer, Stage.FFN_GATE]` is `float32[position, width]`.

    Args:
        side: a recorded trace is read; anything else is run.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: how a checkpoint is computed; by default as llama.cpp does.

    Raises:
        CheckpointError: the side cannot be read or run.
        NoTokens: nothing to feed.
    """
    from aprjax.bisect.open_sides import opened_side
    from aprjax.qwen2.arithmetic import preset
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.text.prompt import encode_prompt

    enable_compilation_cache()
    opened, ids = opened_side(side), _listed(tokens)
    if prompt is not None and opened.checkpoint is not None:
        ids = encode_prompt(opened.checkpoint, prompt, wrap)
    return opened.trace(ids, arithmetic=preset(arithmetic) if isinstance(arithmetic, str) else arithmetic)


def replay(
    side: SideLike,
    file: FileLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    force_file: bool = False,
) -> ReplayReport:
    """Finds the nodes of one trace that its file does not explain, given each node's own inputs.

    Args:
        side: the trace to judge.
        file: the file that should have produced it.
        prompt: text to feed a live side; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: how the engine computes; `auto` tries every preset.
        force_file: judge by this file although the trace names another SHA-256.

    Raises:
        CheckpointError: the side or the file cannot be read, or the file is not the one that was run.
    """
    from aprjax.bisect.replay.command import replay_side

    ids = _listed(tokens)
    return replay_side(side, file, arithmetic=arithmetic, force_file=force_file, prompt=prompt, tokens=ids, times=wrap)


def explain(
    side: SideLike,
    file: FileLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike | None = None,
    max_faults: int = 8,
    force_file: bool = False,
) -> ExplainReport:
    """Says why one trace is not what its file gives: which config key, kernel or tensor, with fitted numbers.

    Args:
        side: the trace to explain.
        file: the file that should have produced it.
        prompt: text to feed a live side; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: how the engine computes; `auto` tries every preset.
        force_file: judge by this file although the trace names another SHA-256.
        max_faults: faults to look for, one after the other.

    Raises:
        CheckpointError: the side or the file cannot be read, or the file is not the one that was run.
    """
    from aprjax.bisect.explain.command import explain_side

    return explain_side(
        side,
        file,
        arithmetic=arithmetic,
        max_faults=max_faults,
        force_file=force_file,
        prompt=prompt,
        tokens=_listed(tokens),
        times=wrap,
    )


def noise(
    file: FileLike,
    prompt: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    wrap: Wrapped = "none",
    arithmetic: ArithmeticLike = "llama.cpp",
    engine: bool = True,
) -> NoiseReport:
    """Measures how far a file differs from itself when only the order or precision of its sums changes.

    Args:
        file: the file.
        prompt: text to feed; or else
        tokens: token ids.
        wrap: how often the prompt is wrapped in ChatML.
        arithmetic: how it is computed.
        engine: also run llama.cpp's own variants, if the file is GGUF and llama.cpp is installed.

    Raises:
        CheckpointError: the file cannot be read or run.
    """
    from aprjax.bisect.noise.report import noise_of

    return noise_of(file, prompt=prompt, tokens=_listed(tokens), times=wrap, arithmetic=arithmetic, engine=engine)


def _listed(tokens: Sequence[int] | None) -> list[int] | None:
    return None if tokens is None else list(tokens)
