"""The factorial itself: which runs there are, which stand for others by proof, and the rest, one model at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from aprjax.bisect.chatml.cells import Continuation, Factorial, FirstLogits, PairFacts, RunKey, Side
from aprjax.bisect.chatml.decode import continue_all
from aprjax.bisect.chatml.facts import Texts, open_texts, pair_facts, side_facts
from aprjax.bisect.chatml.prompts import ChatPrompt
from aprjax.bisect.chatml.store import Store, Stored
from aprjax.bisect.files import compare_files
from aprjax.bisect.margins.top_two import margins
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.model import Qwen2

Progress = Callable[[str, int, int], None]

SAME_FILE = "the two files hold the same weights, byte for byte"
UNTOUCHED = "the rows that differ belong to tokens that this run is not fed"


@dataclass
class _Session:
    """One factorial under way: the runs so far, their first logits, and what every run depends on."""

    fed: Mapping[RunKey, tuple[int, ...]]
    max_new_tokens: int
    store: Store
    backend: str
    code: str
    progress: Progress
    runs: dict[RunKey, Continuation] = field(default_factory=dict)
    first: dict[RunKey, np.ndarray] = field(default_factory=dict)

    def put(self, key: RunKey, stored: Stored) -> None:
        """Enters a run."""
        self.runs[key], self.first[key] = stored.run, stored.first_logits

    def share(self, key: RunKey, other: RunKey, why: str) -> None:
        """Enters `key` as the same as `other`, by proof."""
        self.runs[key] = replace(self.runs[other], shared_with=f"the {other.side}'s run: {why}")
        self.first[key] = self.first[other]

    def tell(self, what: str) -> None:
        """Passes on what is going on."""
        self.progress(what, len(self.runs), len(self.fed))

    def run_side(self, checkpoint: Checkpoint, wanted: Sequence[RunKey]) -> None:
        """One side's runs: those found on disk, then the others, with one model in memory for all arithmetics."""
        loaded: Qwen2 | None = None
        filed = {key: self._filed(checkpoint, key) for key in wanted}
        for key in wanted:
            stored = self.store.get(filed[key])
            if stored is not None:
                self.put(key, stored)
        missing = [key for key in wanted if key not in self.runs]
        # Wrap by wrap: what is finished is kept, and an interruption costs no more than one group.
        for arithmetic, wrap in dict.fromkeys((key.arithmetic, key.wrap) for key in missing):
            group = [key for key in missing if (key.arithmetic, key.wrap) == (arithmetic, wrap)]
            label = f"{group[0].side}, {arithmetic}, wrap {wrap}"
            if loaded is None:
                self.tell(f"loading the {group[0].side}")
                loaded = Qwen2(checkpoint)
            # The weights are the same for every arithmetic.
            runner = copy.copy(loaded)
            runner.arithmetic = preset(arithmetic)

            def done(at: int, stored: Stored, group: Sequence[RunKey] = group, label: str = label) -> None:
                self.put(group[at], stored)
                self.store.put(filed[group[at]], stored)
                self.tell(f"{label}: checking")

            continue_all(
                runner,
                [self.fed[key] for key in group],
                [self._draft(key) for key in group],
                max_new_tokens=self.max_new_tokens,
                backend=self.backend,
                on_done=done,
                on_step=lambda what, label=label: self.tell(f"{label}: {what}"),
            )

    def _filed(self, checkpoint: Checkpoint, key: RunKey) -> dict[str, Any]:
        """All that a run depends on."""
        return {
            "file": checkpoint.sha256(),
            "arithmetic": preset(key.arithmetic).to_json(),
            "tokens": list(self.fed[key]),
            "max_new_tokens": self.max_new_tokens,
            "backend": self.backend,
            "code": self.code,
        }

    def _draft(self, key: RunKey) -> tuple[int, ...] | None:
        """A continuation of the same text that has been computed: the other side's, or another arithmetic's."""
        likely = (
            replace(key, side="ref", ids_of="ref"),
            *(other for other in self.runs if other == replace(key, arithmetic=other.arithmetic)),
            replace(key, ids_of="ref"),
        )
        return next((self.runs[other].tokens for other in likely if other in self.runs), None)


def measure(
    model: Checkpoint,
    ref: Checkpoint,
    *,
    prompts: Sequence[ChatPrompt],
    wraps: Sequence[str],
    arithmetics: Sequence[str],
    max_new_tokens: int,
    store: Store,
    backend: str,
    code: str,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Factorial, Texts]:
    """Runs every cell that no other stands for.

    Args:
        model: the side to judge.
        ref: the side to judge it by.
        prompts: with different names.
        wraps: of none, once, twice.
        arithmetics: presets' names; the first one's continuations are the others' drafts.
        max_new_tokens: of every run.
        store: where finished runs lie.
        backend: platform and device, as `aprjax.trace.trace.this_platform` has it.
        code: digest of the program, `aprjax.bisect.chatml.store.code_digest`.
        progress: told what is going on, and how many runs of how many are done.

    Raises:
        CheckpointError: a file cannot be run or has no tokenizer, a prompt has no tokens, or a prompt and the
            budget exceed the context.
    """
    texts = open_texts(model, ref)
    files = compare_files(model, ref, progress=lambda done, total: progress("comparing the files", done, total))
    facts = pair_facts(model, ref, files, texts, prompts=prompts, wraps=wraps)
    plan = _plan(prompts, wraps, arithmetics, facts)
    fed = _fed(plan, prompts, texts, (model, ref), max_new_tokens)
    session = _Session(fed, max_new_tokens, store, backend, code, progress)
    # One model in memory at a time.
    session.run_side(ref, [key for key in plan if key.side == "ref"])
    session.run_side(model, _not_shared([key for key in plan if key.side == "model"], facts, session))
    factorial = Factorial(
        prompts={prompt.name: prompt for prompt in prompts},
        wraps=tuple(wraps),
        arithmetics=tuple(arithmetics),
        max_new_tokens=max_new_tokens,
        runs=session.runs,
        sides={
            "model": side_facts(model, texts.model, has_tokenizer="model" not in texts.missing),
            "ref": side_facts(ref, texts.ref, has_tokenizer="ref" not in texts.missing),
        },
        facts=facts,
        first_logits=_first_logits(session, facts),
        backend=equal_backend(session.runs),
    )
    return factorial, texts


def equal_backend(runs: Mapping[RunKey, Continuation]) -> str:
    """The one backend that computed every run.

    Raises:
        CheckpointError: there are several: cells of two backends say nothing of each other.
    """
    found = sorted({run.backend for run in runs.values()})
    if len(found) > 1:
        raise CheckpointError(
            f"cells were computed on different backends: {'; '.join(found)}",
            fix="run all of them on one: that confusion is what this command is to end",
        )
    return found[0] if found else ""


def _plan(
    prompts: Sequence[ChatPrompt], wraps: Sequence[str], arithmetics: Sequence[str], facts: PairFacts
) -> list[RunKey]:
    """Every run, those that another one stands for included."""
    plan = []
    for side, arithmetic, wrap, prompt in product(("ref", "model"), arithmetics, wraps, prompts):
        plan.append(RunKey(side, prompt.name, wrap, arithmetic))
        if side == "model" and (prompt.name, wrap) in facts.ids_differ:
            plan.append(RunKey(side, prompt.name, wrap, arithmetic, "model"))
    return plan


def _fed(
    plan: Sequence[RunKey],
    prompts: Sequence[ChatPrompt],
    texts: Texts,
    checkpoints: tuple[Checkpoint, Checkpoint],
    max_new_tokens: int,
) -> dict[RunKey, tuple[int, ...]]:
    """The ids that each run is fed."""
    by_name = {prompt.name: prompt for prompt in prompts}
    context = min(checkpoint.config.max_position_embeddings or 1 << 30 for checkpoint in checkpoints)
    encoded: dict[tuple[str, str, Side], tuple[int, ...]] = {}
    for key in plan:
        at = key.prompt, key.wrap, key.ids_of
        if at in encoded:
            continue
        ids = tuple(texts.of(key.ids_of).encode(by_name[key.prompt].fed(key.wrap)))
        if not ids:
            raise CheckpointError(f"the prompt {key.prompt} has no tokens", fix="give a prompt that is not empty")
        if len(ids) + max_new_tokens > context:
            raise CheckpointError(
                f"the prompt {key.prompt} has {len(ids)} tokens (wrapped {key.wrap}); with {max_new_tokens} more they "
                f"exceed the context of {context}",
                fix="give a shorter prompt, or a smaller --max-new-tokens",
            )
        encoded[at] = ids
    return {key: encoded[key.prompt, key.wrap, key.ids_of] for key in plan}


def _not_shared(wanted: Sequence[RunKey], facts: PairFacts, session: _Session) -> list[RunKey]:
    """The model's runs for which no run of the reference stands; the others are entered."""
    left = []
    for key in wanted:
        twin = replace(key, side="ref")
        if key.ids_of == "ref" and facts.identical_weights:
            session.share(key, twin, SAME_FILE)
        elif key.ids_of == "ref" and _untouched(facts, session.fed[key], session.runs[twin]):
            session.share(key, twin, UNTOUCHED)
        else:
            left.append(key)
    return left


def _untouched(facts: PairFacts, fed: tuple[int, ...], twin: Continuation) -> bool:
    """Whether the files differ in embedding rows only, of tokens that the reference's run is never fed."""
    if not facts.only_special_rows or facts.head_differs:
        return False
    return not facts.special_row_ids.intersection((*fed, *twin.tokens[:-1]))


def _first_logits(session: _Session, facts: PairFacts) -> tuple[FirstLogits, ...]:
    """Model against reference under every arithmetic, and every two arithmetics of one side."""
    found = []
    keys = [key for key in session.runs if key.ids_of == "ref"]
    for key in keys:
        if key.side == "model" and (twin := replace(key, side="ref")) in session.runs:
            found.append(_compare(key, twin, session))
    sides: list[Side] = ["ref"] if facts.identical_weights else ["ref", "model"]
    for side in sides:
        for left, right in combinations([key for key in keys if key.side == side], 2):
            if (left.prompt, left.wrap) == (right.prompt, right.wrap):
                found.append(_compare(right, left, session))
    return tuple(found)


def _compare(left: RunKey, right: RunKey, session: _Session) -> FirstLogits:
    a, b = session.first[left], session.first[right]
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.sqrt((x @ x) * (y @ y)))
    one = margins(a[None], b[None], [0])[0]
    cosine = float(x @ y / norm) if np.isfinite(norm) and norm > 0 else 0.0
    return FirstLogits(left, right, cosine, not one.flip, _finite(one.max_delta), _finite(one.kl))


def _finite(value: float) -> float:
    """JSON has no NaN; logits that are none have no distance, and their cosine of 0 says so."""
    return value if np.isfinite(value) else float(np.finfo(np.float32).max)
