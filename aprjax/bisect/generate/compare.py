"""`generate`: do two sides continue a prompt with the same words, and if not, does noise explain where they part?

The reference decodes step by step. The model is fed the reference's tokens in one pass and says at each what it
would have chosen: up to its first other choice that is its own greedy continuation, since both were fed the
same. Only from there on does it decode by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aprjax.bisect.generate.report import Continuation, FirstDifference, GenerateReport, Kind, Step, View
from aprjax.bisect.generate.sides import Generator
from aprjax.bisect.generate.text import Words, vocabulary_findings
from aprjax.bisect.noise.logits import LogitNoise
from aprjax.bisect.report import PromptInfo, SidedFinding, SideMargin, Verdict, sided
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.checkpoint.types import Finding
from aprjax.trace.generation import Generated, Likeliest, Passes, Scored, Stop

# Given the tokens that both sides were fed, and the positions that matter.
MeasureNoise = Callable[[tuple[int, ...], tuple[int, ...]], LogitNoise]
# Positions at which the noise is measured, at most: the last ones before the difference.
NOISE_POSITIONS = 64

ONE_PASS = "in one pass"
STEPWISE = "step by step"


@dataclass(frozen=True)
class _Told:
    """The model's continuation, and what it says about every step of the common part.

    Attributes:
        tokens: its continuation.
        stop: why it ended.
        likeliest: along its own continuation, or along the reference's up to the first difference.
        at: the first step at which it differs from the reference.
        passes: what it cost.
        confirmed: how it was computed.
        ref_choice: rank and logit of the reference's token at `at`, where the pass has told them.
    """

    tokens: tuple[int, ...]
    stop: Stop
    likeliest: Likeliest
    at: int | None
    passes: Passes
    confirmed: str
    ref_choice: tuple[int, float] | None = None


def generate(
    model: Generator,
    ref: Generator,
    *,
    tokens: TokensReport,
    max_new_tokens: int,
    ignore_stop: bool = False,
    step_by_step: bool = False,
    shared: str = "",
    findings: Sequence[SidedFinding] = (),
    measure_noise: MeasureNoise,
) -> GenerateReport:
    """Compares the greedy continuations of two sides.

    Args:
        model: the side under suspicion.
        ref: the side it is judged by.
        tokens: what both are fed, and whether the two tokenizers agree on it.
        max_new_tokens: how long a continuation may get; at least 1.
        ignore_stop: both go on after tokens that end an answer.
        step_by_step: the model decodes by itself instead of verifying the reference's tokens in one pass.
        shared: why both sides compute the same numbers, if they do: then the model computes nothing.
        findings: what is known of the files, for the report.
        measure_noise: gives the noise of the logits; called only if the two choose differently.

    Raises:
        CheckpointError: a file lacks what a forward pass needs, or an engine failed.
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is expected to be at least 1, found {max_new_tokens}")
    start = time.perf_counter()
    prompt = tokens.ids
    theirs = ref.generate(prompt, max_new_tokens, ignore_stop=ignore_stop)
    decoded = time.perf_counter()
    asked = _Asked(
        model, ref, prompt, max_new_tokens=max_new_tokens, ignore_stop=ignore_stop, measure_noise=measure_noise
    )
    ours = asked.tell(theirs, shared=shared, step_by_step=step_by_step)
    words = Words.of(model.checkpoint, ref.checkpoint)
    first = asked.first_difference(ours, theirs, words)
    noise = asked.noise
    common = len(theirs.tokens) if first is None else first.step
    common += int(first is not None and first.kind is Kind.STOP)
    steps = _steps(ours.likeliest, theirs, words, common, len(prompt))
    close = None
    if noise is not None:
        within = noise.near_tie_gap
        close = tuple(
            s.step for s in steps if any(m is not None and m <= within for m in (s.model_margin, s.ref_margin))
        )
    shown, rest = words.aligned(theirs.tokens[:common], (ours.tokens[common:], theirs.tokens[common:]))
    vocabularies = vocabulary_findings(model.checkpoint, ref.checkpoint, {*prompt, *theirs.tokens, *ours.tokens})
    verdict, reason = _verdict(first, (*tokens.findings, *vocabularies), ours, theirs, tokens=tokens)
    if tokens.agree and first is not None and first.kind is Kind.TOKEN and model.arithmetic != ref.arithmetic:
        # Sigma is each arithmetic's own noise, not the distance between the two.
        reason += f"; the model computes in {model.arithmetic.name} arithmetic, the reference in {ref.arithmetic.name}"
    compared = range(len(prompt) - 1, len(prompt) - 1 + max(common, 1))
    return GenerateReport(
        verdict=verdict,
        reason=reason,
        first_difference=first,
        sides={"model": model.info, "ref": ref.info},
        prompt=PromptInfo(tokens.name, tokens.text, tokens.wrap, prompt, tuple(compared)),
        max_new_tokens=max_new_tokens,
        ignore_stop=ignore_stop,
        common_text=shown,
        continuations={
            "model": Continuation(
                ours.tokens, words.text(ours.tokens), rest[0], ours.stop, ours.passes + asked.looked(model)
            ),
            "ref": Continuation(
                theirs.tokens, words.text(theirs.tokens), rest[1], theirs.stop, theirs.passes + asked.looked(ref)
            ),
        },
        steps=steps,
        shared=shared,
        close_steps=close,
        noise=None if noise is None else noise.to_json(),
        engines={name: side.engine for name, side in (("model", model), ("ref", ref)) if side.engine},
        findings=(*findings, *(sided(finding, "both") for finding in (*tokens.findings, *vocabularies))),
        seconds={"reference": decoded - start, "model and noise": time.perf_counter() - decoded},
    )


class _Asked:
    """One prompt of two sides, with what its parts share.

    Attributes:
        noise: of the logits, once it was needed.
    """

    def __init__(
        self,
        model: Generator,
        ref: Generator,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        ignore_stop: bool,
        measure_noise: MeasureNoise,
    ) -> None:
        self._model, self._ref, self._prompt = model, ref, prompt
        self._max_new_tokens, self._ignore_stop, self._measure = max_new_tokens, ignore_stop, measure_noise
        self._looked = {id(model): Passes(), id(ref): Passes()}
        self.noise: LogitNoise | None = None

    def looked(self, side: Generator) -> Passes:
        """What it cost to look up how a side ranks the other's choice."""
        return self._looked[id(side)]

    def tell(self, theirs: Generated, *, shared: str, step_by_step: bool) -> _Told:
        """The model's continuation."""
        if shared:
            return self._to_the_end(theirs, theirs.likeliest, Passes())
        if step_by_step:
            return self._alone(theirs, Passes())
        scored = self._model.score(self._prompt, theirs.tokens)
        at = _first_other(scored.likeliest, theirs)
        ends = self._model_ends(theirs.tokens)
        if at is None or (ends is not None and ends < at):
            return self._to_the_end(theirs, scored.likeliest, scored.passes)
        if self._model.batching_rounds and self._within_noise(scored, theirs, at):
            return self._alone(theirs, scored.passes)
        choice = scored.likeliest.best[at]
        tokens, stop, passes = self._go_on((*theirs.tokens[:at], choice), scored.passes)
        known = (int(scored.ranks[at]), float(scored.logits[at]))
        return _Told(tokens, stop, scored.likeliest.first(at + 1), at, passes, ONE_PASS, known)

    def _within_noise(self, scored: Scored, theirs: Generated, at: int) -> bool:
        if not (scored.likeliest.finite[at] and theirs.likeliest.finite[at]):
            return False
        gap = float(scored.likeliest.logits[at, 0]) - float(scored.logits[at])
        return self._known_noise(theirs, at).is_near_tie(gap, int(scored.ranks[at]))

    def _alone(self, theirs: Generated, before: Passes) -> _Told:
        """The model decodes by itself: nothing that was fed at once has a part in it."""
        self._model.forget()
        run = self._model.generate(self._prompt, self._max_new_tokens, ignore_stop=self._ignore_stop)
        at = _first_other(run.likeliest, theirs)
        return _Told(run.tokens, run.stop, run.likeliest, at, before + run.passes, STEPWISE)

    def _model_ends(self, tokens: tuple[int, ...]) -> int | None:
        """The first step at which a token ends the model's answer."""
        if self._ignore_stop:
            return None
        stop_ids = self._model.stop_ids
        return next((step for step, token in enumerate(tokens) if token in stop_ids), None)

    def _to_the_end(self, theirs: Generated, likeliest: Likeliest, passes: Passes) -> _Told:
        """The model chooses the reference's tokens, and stops where its own file says so."""
        tokens, stop, ends = theirs.tokens, theirs.stop, self._model_ends(theirs.tokens)
        if ends is not None:
            tokens, stop = tokens[: ends + 1], Stop.TOKEN
        elif stop is Stop.TOKEN:
            tokens, stop, passes = self._go_on(tokens, passes)
        return _Told(tokens, stop, likeliest, None, passes, ONE_PASS)

    def _go_on(self, chosen: tuple[int, ...], passes: Passes) -> tuple[tuple[int, ...], Stop, Passes]:
        """The model decodes after tokens that it has chosen."""
        if not self._ignore_stop and chosen[-1] in self._model.stop_ids:
            return chosen, Stop.TOKEN, passes
        left = self._max_new_tokens - len(chosen)
        if left == 0:
            return chosen, Stop.BUDGET, passes
        run = self._model.generate((*self._prompt, *chosen), left, ignore_stop=self._ignore_stop)
        return (*chosen, *run.tokens), run.stop, passes + run.passes

    def _known_noise(self, theirs: Generated, at: int) -> LogitNoise:
        if self.noise is None:
            fed = (*self._prompt, *theirs.tokens[:at])
            self.noise = self._measure(fed, tuple(range(max(0, len(fed) - NOISE_POSITIONS), len(fed))))
        return self.noise

    def first_difference(self, ours: _Told, theirs: Generated, words: Words) -> FirstDifference | None:
        """Where the two part, as both see it, and the verdict on it."""
        at = ours.at
        prompt = len(self._prompt)
        if at is None:
            if len(ours.tokens) == len(theirs.tokens) and ours.stop is theirs.stop:
                return None
            # Both chose the same tokens, and one of the two ends there.
            step = min(len(ours.tokens), len(theirs.tokens)) - 1
            nothing = View(None, None, None)
            piece = words.piece(theirs.tokens[step])
            pieces = None if piece is None else (piece, piece)
            position = prompt - 1 + step
            return FirstDifference(
                step, position, Kind.STOP, nothing, nothing, pieces, Verdict.DIVERGENCE, ours.confirmed, None
            )
        mine, other = ours.tokens[at], theirs.tokens[at]
        piece, its = words.piece(mine), words.piece(other)
        found = FirstDifference(
            step=at,
            position=prompt - 1 + at,
            kind=Kind.TOKEN,
            model=self._view(self._model, ours.likeliest, theirs.tokens[:at], other, ours.ref_choice),
            ref=self._view(self._ref, theirs.likeliest, theirs.tokens[:at], mine, None),
            pieces=None if piece is None or its is None else (piece, its),
            verdict=Verdict.DIVERGENCE,
            confirmed=ours.confirmed,
            gap_in_sigmas=None,
        )
        views = (found.model, found.ref)
        if any(view.gap is None for view in views):
            both = all(view.gap is None for view in views)
            return replace(found, kind=Kind.NOT_FINITE, verdict=Verdict.UNMEASURED if both else Verdict.DIVERGENCE)
        noise = self._known_noise(theirs, at)
        # Both gaps, as in `margins`: where the reference is undecided and the model is sure, noise explains nothing.
        near = noise.is_near_tie(found.gap or 0.0, found.ref.rank or 0)
        sigmas = noise.in_sigmas(found.gap or 0.0)
        return replace(found, verdict=Verdict.NEAR_TIE if near else Verdict.DIVERGENCE, gap_in_sigmas=sigmas)

    def _view(
        self,
        side: Generator,
        likeliest: Likeliest,
        common: tuple[int, ...],
        other: int,
        told: tuple[int, float] | None,
    ) -> View:
        """How a side sees the other's choice; a choice far down its list is looked up by one more pass."""
        at = len(common)
        if not likeliest.finite[at]:
            return View(None, None, None)
        margin, best = _margin(likeliest, at), float(likeliest.logits[at, 0])
        known = [int(token) for token in likeliest.ids[at]]
        if other in known:
            index = known.index(other)
            return View(margin, index + 1, best - float(likeliest.logits[at, index]))
        if told is not None:
            return View(margin, told[0], best - told[1])
        scored = side.score((*self._prompt, *common), (other,))
        self._looked[id(side)] += scored.passes
        gap = float(scored.likeliest.logits[0, 0]) - float(scored.logits[0])
        return View(margin, int(scored.ranks[0]), gap)


def _first_other(likeliest: Likeliest, theirs: Generated) -> int | None:
    """The first step with another choice, or with logits that are numbers on one side only."""
    mine = zip(likeliest.best, likeliest.finite, strict=True)
    other = zip(theirs.tokens, theirs.likeliest.finite, strict=True)
    # One of the two may have stopped before the other.
    pairs = zip(mine, other, strict=False)
    return next((step for step, ((a, finite), (b, too)) in enumerate(pairs) if a != b or finite != too), None)


def _margin(likeliest: Likeliest, step: int) -> SideMargin:
    ids, logits = likeliest.ids[step], likeliest.logits[step]
    second = min(1, len(ids) - 1)
    return SideMargin(int(ids[0]), int(ids[second]), float(logits[0]) - float(logits[second]))


def _steps(ours: Likeliest, theirs: Generated, words: Words, common: int, prompt: int) -> tuple[Step, ...]:
    def margin(likeliest: Likeliest, step: int) -> float | None:
        found = _margin(likeliest, step).margin if likeliest.finite[step] else math.nan
        return found if math.isfinite(found) else None

    return tuple(
        Step(
            step,
            prompt - 1 + step,
            theirs.tokens[step],
            words.piece(theirs.tokens[step]),
            margin(ours, step),
            margin(theirs.likeliest, step),
        )
        for step in range(common)
    )


def _verdict(
    first: FirstDifference | None,
    findings: tuple[Finding, ...],
    ours: _Told,
    theirs: Generated,
    *,
    tokens: TokensReport,
) -> tuple[Verdict, str]:
    if not tokens.agree:
        return Verdict.DIVERGENCE, tokens.reason
    wrong = next((finding for finding in findings if finding.id == "vocabularies-differ"), None)
    if wrong is not None and wrong.severity == "error":
        return Verdict.DIVERGENCE, wrong.message
    if first is None:
        if not theirs.likeliest.finite.all():
            return Verdict.UNMEASURED, "both sides compute logits that are no numbers: nothing is compared"
        count = len(theirs.tokens)
        return Verdict.AGREE, f"both sides choose the same {count} token{'s'[: count - 1]}, {ending(theirs.stop)}"
    return first.verdict, reason_of(first, ours.stop)


def reason_of(first: FirstDifference, model_stop: Stop) -> str:
    """Where two continuations part and what explains it, in a sentence."""
    named = first.pieces or ("?", "?")
    if first.kind is Kind.STOP:
        who, other = ("model", "reference") if model_stop is Stop.TOKEN else ("reference", "model")
        return (
            f"both choose “{named[0]}” as new token {first.step + 1}; it ends the {who}'s answer and not the "
            f"{other}'s: their stop tokens differ"
        )
    where = f"at new token {first.step + 1} the model says “{named[0]}” and the reference “{named[1]}”"
    if first.kind is Kind.NOT_FINITE:
        return f"at new token {first.step + 1} logits are no numbers, on {_whose(first)}"
    gap = f"across {first.gap:.3g} logits"
    gap += "" if first.gap_in_sigmas is None else f" ({first.gap_in_sigmas:.3g} sigma)"
    if first.verdict is Verdict.NEAR_TIE:
        return f"{where}, {gap}: within the noise of these logits"
    rank = first.ref.rank or 0
    lower = "" if rank <= 2 else f"; the reference ranks the model's choice {rank}"
    return f"{where}, {gap}: more than the noise of these logits explains{lower}"


def _whose(first: FirstDifference) -> str:
    broken = [
        name for name, view in (("the model's side", first.model), ("the reference's", first.ref)) if view.gap is None
    ]
    return " and ".join(broken)


def ending(stop: Stop) -> str:
    """Why a continuation ended, in words."""
    return "to a stop token" if stop is Stop.TOKEN else "as many as were asked for"
