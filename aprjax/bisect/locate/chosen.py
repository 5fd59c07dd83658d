"""Where two arithmetics drift apart on equal files: which of their choices does it, at the place and everywhere.

One choice of the reference at a time is put into the model: at the place that was found, from the reference's own
inputs, and in all layers at once. The reverse is run, too, where the reference can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from aprjax.bisect.choices import (
    CHOICES,
    Choice,
    accuse_choices,
    input_block,
    loudest,
    told_apart,
    words_of,
)
from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.locate.report import ChoiceEffect, LocatedFault, Run
from aprjax.bisect.locate.search import SHARP, Search, logit_drift
from aprjax.bisect.metrics import relative_l2
from aprjax.bisect.patching import PatchedModel, RunReference
from aprjax.bisect.reads import differs_at
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage


def chosen_at(search: Search, faults: Iterable[LocatedFault]) -> tuple[tuple[LocatedFault, ...], tuple[Choice, ...]]:
    """The faults, those of the arithmetic with the choice that does it in words; and these choices."""
    named, guilty = [], {}
    for fault in faults:
        found = _choices_at(search, fault.layer, fault.stage)
        if not found:
            named.append(fault)
            continue
        choices, confidence = found
        guilty.update({choice.name: choice for choice in choices})
        model, ref = search.sides
        loud = None
        fed = input_block(choices, model, fault.layer, fault.stage)
        if fed is not None:
            value = search.reference.stages(fault.layer).get(fed[0])
            loud = None if value is None else loudest(value[: len(search.model.tokens)], fed[1])
        accused = accuse_choices(choices, model, ref, [(fault.layer, fault.stage)], confidence, loud=loud)
        cause = f"the files agree here; {accused.cause}"
        named.append(replace(fault, cause=cause, next_step=accused.next_step, confidence=accused.confidence))
    return tuple(named), tuple(guilty.values())


def _choices_at(search: Search, layer: int, stage: Stage) -> tuple[tuple[Choice, ...], Confidence] | None:
    """The guilty choices at a place; None where the files differ there, or the arithmetics do not."""
    model, ref = search.sides
    files = search.files
    if files is None or layer == OUTSIDE or differs_at(layer, stage, files):
        return None
    choices = told_apart(layer, stage, model, ref)
    if not choices or model.arithmetic == ref.arithmetic:
        return None
    theirs, given = search.reference.stages(layer), search.reference.boundary(layer)
    clean = {s: theirs[s] for s in LAYER_STAGES[: LAYER_STAGES.index(stage)] if s in theirs}
    count = len(search.model.tokens)

    def local(patched: PatchedModel) -> float:
        computed = patched.layer(layer, given, clean)[1][stage]
        return relative_l2(computed[:count], theirs[stage][:count]) or 0.0

    before = local(search.model)
    left = {choice.name: local(_put_right(search, choice)) for choice in choices}
    best = min(choices, key=lambda choice: left[choice.name])
    if left[best.name] < before / SHARP:
        basis = f"with the reference's choice here the stage's own difference falls from {before:.2g} to "
        return (best,), Confidence(Level.STRONG, f"{basis}{left[best.name]:.2g}")
    tried = ", ".join(f"{name} leaves {found:.2g}" for name, found in left.items())
    return choices, Confidence(Level.WEAK, f"no choice alone explains the stage's difference of {before:.2g}: {tried}")


def _put_right(search: Search, choice: Choice) -> PatchedModel:
    """The model with the reference's choice."""
    return search.model.under(choice.put_into(search.model.runner.arithmetic, search.sides[1].arithmetic))


def effects_everywhere(search: Search, drift: float, choices: Iterable[Choice]) -> tuple[ChoiceEffect, ...]:
    """What each choice does in all layers at once, the one that heals most first.

    Without a place nothing is known of the guilty ones: then all in which the arithmetics differ are tried.
    """
    model, ref = search.sides
    if model.arithmetic == ref.arithmetic:
        return ()
    differing = [choice for choice in CHOICES if choice.differs(model.arithmetic, ref.arithmetic)]
    wanted = tuple(choices) or [c for c in differing if c.name != "order of sums"] or differing
    places = [(layer, stage) for layer in range(len(search.model.layers)) for stage in LAYER_STAGES]
    found = []
    for choice in wanted:
        after = _ask(search, _put_right(search, choice), f"the reference's {choice.name} put in everywhere", "model")
        infects = None
        if isinstance(search.reference, RunReference):
            mine = search.reference.model
            changed = mine.under(choice.put_into(mine.runner.arithmetic, model.arithmetic))
            infects = _ask(search, changed, f"the model's {choice.name} put into the reference everywhere", "ref")
        ours, theirs = (words_of((choice,), side, places) for side in (model, ref))
        found.append(ChoiceEffect(choice.name, ours, theirs, drift, after, infects))
    return tuple(sorted(found, key=lambda effect: effect.after))


def _ask(search: Search, patched: PatchedModel, question: str, side: str) -> float:
    drift = logit_drift(patched.run(), search.reference.logits)
    search.runs.append(Run(question, side, drift, drift <= search.floor, "logits", len(patched.layers)))
    search.progress(question, len(search.runs), 0)
    return drift
