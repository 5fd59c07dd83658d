"""What `python -m bisect chatml` does: open, run the factorial, judge, and make the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aprjax.bisect.chatml.causes import find_causes
from aprjax.bisect.chatml.cells import Factorial, Stop
from aprjax.bisect.chatml.claims import judge_claims
from aprjax.bisect.chatml.facts import Texts, decode_text
from aprjax.bisect.chatml.judged import judge_cells
from aprjax.bisect.chatml.measure import measure
from aprjax.bisect.chatml.noise import measure_noise
from aprjax.bisect.chatml.partings import pairings
from aprjax.bisect.chatml.prompts import UPSTREAM_PROMPTS, WRAPS, ChatPrompt
from aprjax.bisect.chatml.report import ChatmlReport
from aprjax.bisect.chatml.store import Store, code_digest
from aprjax.bisect.report import SidedFinding
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.compilation import enable_compilation_cache

Progress = Callable[[str, int, int], None]

ARITHMETICS = ("float32", "llama.cpp", "realizar")
# The budget of `apr run` and of upstream's prompt-sensitivity tests (contracts.md sections 1.3 and 8).
BUDGET = 32


@dataclass(frozen=True)
class AsRun:
    """How each side is said to have run, where that differs: (model, reference), None for every value alike."""

    wraps: tuple[str, str] | None = None
    arithmetics: tuple[str, str] | None = None
    stops: tuple[Stop, Stop] | None = None

    def asked(self) -> dict[str, tuple[str, str]]:
        """The factors that were given, by name."""
        given = {"wrap": self.wraps, "arithmetic": self.arithmetics, "stop tokens": self.stops}
        return {name: pair for name, pair in given.items() if pair is not None}


@dataclass(frozen=True)
class Asked:
    """What a factorial is asked.

    Attributes:
        prompts: with different names.
        wraps: of none, once, twice.
        arithmetics: presets' names; the first one's continuations are the others' drafts.
        max_new_tokens: tokens of every continuation.
        as_run: where the sides ran unlike each other.
        noise: measure the noise floor where a token flips.
    """

    prompts: Sequence[ChatPrompt] = UPSTREAM_PROMPTS
    wraps: Sequence[str] = WRAPS
    arithmetics: Sequence[str] = ARITHMETICS
    max_new_tokens: int = BUDGET
    as_run: AsRun = AsRun()
    noise: bool = True


def run_chatml(
    model: Checkpoint,
    ref: Checkpoint,
    asked: Asked,
    *,
    state: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ChatmlReport:
    """Runs the factorial on two files, and judges it.

    Args:
        model: the file to judge.
        ref: the file to judge it by.
        asked: what to run.
        state: folder of finished runs; None to keep none.
        progress: told what is going on, and how many runs of how many are done.

    Raises:
        CheckpointError: see `measure`.
    """
    from aprjax.trace.trace import this_platform

    begun = time.perf_counter()
    enable_compilation_cache()
    as_run = asked.as_run
    factorial, texts = measure(
        model,
        ref,
        prompts=asked.prompts,
        wraps=tuple(dict.fromkeys((*asked.wraps, *(as_run.wraps or ())))),
        arithmetics=tuple(dict.fromkeys((*asked.arithmetics, *(as_run.arithmetics or ())))),
        max_new_tokens=asked.max_new_tokens,
        store=Store.at(state),
        backend=this_platform(),
        code=code_digest(),
        progress=progress,
    )
    comparisons = pairings(factorial, wraps=as_run.wraps, arithmetics=as_run.arithmetics, stops=as_run.stops)
    causes = find_causes(factorial, comparisons)
    if asked.noise and causes.partings:
        factorial = replace(factorial, noise=measure_noise(factorial, causes.partings, model, ref, progress))
        causes = find_causes(factorial, comparisons)
    cells = judge_cells(
        factorial,
        {
            "model": lambda tokens: decode_text(texts.model, tokens),
            "ref": lambda tokens: decode_text(texts.ref, tokens),
        },
    )
    return ChatmlReport(
        factorial=factorial,
        cells=cells,
        causes=causes,
        claims=judge_claims(factorial, cells, causes),
        findings=_findings(factorial, texts, asked.prompts),
        asked=as_run.asked(),
        seconds=time.perf_counter() - begun,
    )


def _findings(factorial: Factorial, texts: Texts, prompts: Sequence[ChatPrompt]) -> tuple[SidedFinding, ...]:
    found = []
    for side, reason in texts.missing.items():
        found.append(SidedFinding("tokenizer-missing", "warning", reason, side=side))
    for side, facts in factorial.sides.items():
        undeclared = facts.named_stops - facts.declared_stops
        if not facts.declared_stops and facts.has_tokenizer:
            message = "the file declares no token that ends an answer: engines that do not go by names run past its end"
            found.append(SidedFinding("stop-token-undeclared", "warning", message, reference="PR #1615", side=side))
        elif undeclared:
            names = ", ".join(texts.of(side).token(i) for i in sorted(undeclared)[:4])
            message = f"llama.cpp also ends an answer at {names}, which the metadata does not declare"
            found.append(SidedFinding("stop-token-by-name", "info", message, side=side))
    for text, ours, theirs in factorial.facts.special_ids[:5]:
        message = f"the special token {text!r} has the id {ours} in the model and {theirs} in the reference"
        found.append(SidedFinding("special-token-id-differs", "error", message, side="both"))
    if factorial.facts.special_rows:
        names = ", ".join(factorial.facts.special_rows[:5])
        message = f"embedding or head rows of special tokens differ: {names}"
        found.append(SidedFinding("special-token-row-differs", "error", message, side="both"))
    for prompt in prompts:
        if prompt.given == 1:
            message = f"the prompt {prompt.name!r} came as ChatML: wrapping it once more feeds it wrapped twice"
            found.append(SidedFinding("prompt-wrapped-already", "info", message, side="both"))
        elif prompt.given > 1:
            message = f"the prompt {prompt.name!r} came wrapped {prompt.given} times: a turn inside a turn is no ChatML"
            found.append(SidedFinding("prompt-double-wrapped", "error", message, reference="#3672, #3743", side="both"))
    return tuple(found)
