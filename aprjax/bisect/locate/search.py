"""Halving: the boundary, and in the layer before it the stage, from which the reference's values heal the model.

A value of the reference put in at a boundary takes away everything that went wrong before it. So the first
boundary behind which nothing goes wrong any more is found by halving, and in the layer before it the first stage
likewise. What is found is the last cause; the layers before it are then searched for another, up to where
the model's own values are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from aprjax.bisect.cause import accuse
from aprjax.bisect.files import FilesReport
from aprjax.bisect.locate.report import LocatedFault, Parts, Run
from aprjax.bisect.lockstep import Values, arbiter
from aprjax.bisect.metrics import relative_l2
from aprjax.bisect.noise.floor import FACTOR
from aprjax.bisect.parts import carrying_parts
from aprjax.bisect.patching import Hidden, Logits, PatchedModel, Reference, RunReference
from aprjax.bisect.traced import Side, Traced
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

Progress = Callable[[str, int, int], None]
# Causes named at most; every one costs a search. Who has more has a conversion to redo, not a bug to find.
MOST_FAULTS = 4
# A place is named under noise only if the drift falls there by this factor: a single cause falls to the floor at once,
# while of a drift that gathers evenly over many layers each takes a small share. Any factor well between would do.
SHARP = 2.0
# Before the last guilty stage of a layer another is looked for only if its local difference is at least this share
# of that one's: what is smaller still shows when the larger one is mended.
_BESIDE = 0.01


@dataclass
class Search:
    """What accumulates while the search goes on."""

    model: PatchedModel
    reference: Reference
    files: FilesReport | None
    sides: tuple[Side, Side]
    floor: float
    progress: Progress
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Goal:
    """Where the drift is measured: at the logits, or (for a cause before another) at a boundary.

    Attributes:
        search: has both sides.
        boundary: where a run stops; the last one for the logits.
        floor: the drift that noise explains there.
        logits: whether the head follows.
    """

    search: Search
    boundary: int
    floor: float
    logits: bool

    @property
    def name(self) -> str:
        """For a `Run`."""
        return "logits" if self.logits else f"input of layer {self.boundary}"

    def drift(self, hidden: Hidden) -> float:
        """How far a value at the boundary leads from the reference."""
        model, reference = self.search.model, self.search.reference
        if self.logits:
            return logit_drift(model.logits(hidden), reference.logits)
        count = len(model.tokens)
        far = relative_l2(hidden[:count], reference.boundary(self.boundary)[:count])
        return float("inf") if far is None or not np.isfinite(far) else far

    def ask(self, question: str, drift: float, *, layers: int, side: str = "model") -> Run:
        """Writes a run down."""
        run = Run(question, side, drift, drift <= self.floor, self.name, layers)
        self.search.runs.append(run)
        self.search.progress(question, len(self.search.runs), 0)
        return run

    def put_in(self, boundary: int) -> Run:
        """The model run on from the reference's value at a boundary."""
        model, reference = self.search.model, self.search.reference
        name = "embedding" if boundary == 0 else f"output of layer {boundary - 1}"
        hidden = model.counted(lambda: model.resume(reference.boundary(boundary), boundary, self.boundary))
        return self.ask(f"the reference's {name} put in", self.drift(hidden), layers=self.boundary - boundary)


def logit_drift(logits: Logits, ref: Logits) -> float:
    """Standard deviation over the vocabulary of the logits' difference, root mean square over the positions.

    A shift of all logits alike moves no choice and does not count. Infinite where a logit is not finite.
    """
    delta = logits.astype(np.float64) - ref.astype(np.float64)
    drift = float(np.sqrt(np.mean(delta.var(axis=1, ddof=1))))
    return drift if np.isfinite(drift) else float("inf")


def find_causes(search: Search, drift: float) -> tuple[tuple[LocatedFault, ...], int | None]:
    """The causes in execution order; or, where there is no single place, where half of the drift has come together."""
    model = search.model
    goal = Goal(search, len(model.layers), search.floor, logits=True)
    at_the_end = goal.put_in(len(model.layers))
    faults: list[LocatedFault] = []
    if not at_the_end.healed:
        faults.append(_at_the_head(goal, at_the_end.drift))
        goal = _before(search, len(model.layers))
        drift = goal.drift(model.boundaries[goal.boundary])
    while len(faults) < MOST_FAULTS and drift > goal.floor:
        found = _first_healed(goal, drift)
        if found is None:
            return tuple(faults), None if faults else _half(goal, drift)
        here = _in_the_layer(goal, *found)
        faults = [*here, *faults]
        if here[0].layer == OUTSIDE:
            break
        goal = _before(search, here[0].layer)
        drift = goal.drift(model.boundaries[goal.boundary])
    return tuple(faults), None


def _before(search: Search, layer: int) -> Goal:
    """The goal of the search for causes before a layer: its input.

    Under noise, rounding explains `FACTOR` times the distance from a run with float64 sums.
    """
    model = search.model
    if search.floor == 0:
        return Goal(search, layer, 0.0, logits=False)
    runner = replace(model.runner, arithmetic=arbiter(model.runner.arithmetic))
    hidden, context = model.embedded, runner.context(len(model.embedded))
    for index in range(layer):
        hidden, _ = runner.run(model.layers[index], hidden, context)
    count = len(model.tokens)
    floor = FACTOR * (relative_l2(hidden[:count], model.boundaries[layer][:count]) or 0.0)
    return Goal(search, layer, floor, logits=False)


def _first_healed(goal: Goal, free: float) -> tuple[int, float, float] | None:
    """The first boundary from which the model goes on without drift, and the drifts before and at it.

    None where the drift falls too gently to name a place.
    """
    low, high, unhealed, healed = -1, goal.boundary, free, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        run = goal.put_in(middle)
        if run.healed:
            high, healed = middle, run.drift
        else:
            low, unhealed = middle, run.drift
    if goal.floor and unhealed < SHARP * max(goal.floor, healed):
        return None
    return high, unhealed, healed


def _in_the_layer(goal: Goal, boundary: int, unhealed: float, healed: float) -> list[LocatedFault]:
    """The first stage of the layer before a boundary with which the drift goes, and guilty ones before it."""
    search, model, layer = goal.search, goal.search.model, boundary - 1
    if boundary == 0:
        return [_fault(goal, OUTSIDE, Stage.EMBEDDING, before=unhealed, after=healed)]
    theirs, given = search.reference.stages(layer), search.reference.boundary(layer)
    stages = [stage for stage in LAYER_STAGES if stage in theirs]

    def put_in(values: Values, question: str) -> tuple[Run, Values]:
        hidden, captured = model.layer(layer, given, values)
        hidden = model.resume(hidden, layer + 1, goal.boundary)
        return goal.ask(question, goal.drift(hidden), layers=goal.boundary - layer), captured

    low, high = 0, len(stages)
    captured: Values = {}
    while high - low > 1:
        middle = (low + high) // 2
        values = {stage: theirs[stage] for stage in stages[:middle]}
        question = f"the reference's layer {layer} put in up to {stages[middle - 1]}"
        run, local = model.counted(lambda values=values, question=question: put_in(values, question))
        if run.healed:
            high, healed, captured = middle, run.drift, local
        else:
            low, unhealed = middle, run.drift
    stage = stages[high - 1]
    clean = {s: theirs[s] for s in stages[: high - 1]}
    if stage not in captured:
        _, captured = model.layer(layer, given, clean)
    named = None
    found = _parts(search, stage, captured[stage], theirs[stage])
    if found is not None:
        parts, mixed = found
        question = f"only {parts.kind} {', '.join(parts.names)} of {stage} put in, layer {layer}"
        run, _ = model.counted(lambda: put_in({**clean, stage: mixed}, question))
        share = 1.0 - run.drift / unhealed if unhealed else 0.0
        # What does not heal by itself is no answer: then the whole stage is the place.
        named = replace(parts, healed=share) if share > 1 / SHARP else None
    infects = _infect(goal, layer, stage, {**clean, stage: captured[stage]})
    last = _fault(goal, layer, stage, before=unhealed, after=healed, infects=infects, parts=named)
    return [*_beside(goal, layer, captured, theirs, stages[:high]), last]


def _beside(goal: Goal, layer: int, captured: Values, theirs: Values, stages: list[Stage]) -> list[LocatedFault]:
    """Stages before the last of `stages` that differ by themselves, and move the reference when put into it."""
    count = len(goal.search.model.tokens)
    local = {stage: relative_l2(captured[stage][:count], theirs[stage][:count]) or 0.0 for stage in stages}
    *earlier, last = stages
    found = []
    for stage in earlier:
        if (
            local[stage] == 0
            or local[stage] < _BESIDE * local[last]
            or stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)
        ):
            continue
        clean = {s: theirs[s] for s in stages[: stages.index(stage)]}
        infects = _infect(goal, layer, stage, {**clean, stage: captured[stage]})
        if infects is not None and infects > goal.search.floor:
            found.append(_fault(goal, layer, stage, before=infects, after=0.0, infects=infects))
    return found


def _parts(search: Search, stage: Stage, ours: np.ndarray, theirs: np.ndarray) -> tuple[Parts, np.ndarray] | None:
    """The parts that carry a stage's difference, and the model's value with the reference's in these parts."""
    if stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):
        return None  # their padding lies between the columns
    count = len(search.model.tokens)
    difference = np.where(ours == theirs, 0.0, ours.astype(np.float64) - theirs)[:count]
    found = carrying_parts(stage, difference, search.model.runner.checkpoint.config)
    if found is None:
        return None
    parts, mask = found
    mixed = np.array(ours)
    mixed[:count] = np.where(mask, theirs[:count], ours[:count])
    return parts, mixed


def _infect(goal: Goal, layer: int, stage: Stage, values: Values) -> float | None:
    """The drift that the reference takes on with the model's value of one stage; None where it cannot be run."""
    reference = goal.search.reference
    if not isinstance(reference, RunReference):
        return None
    ref = reference.model

    def run() -> Logits:
        hidden, _ = ref.layer(layer, reference.boundary(layer), values)
        return ref.logits(ref.resume(hidden, layer + 1))

    drift = logit_drift(ref.counted(run), reference.logits)
    at_the_logits = replace(goal, logits=True, floor=goal.search.floor)
    question = f"the model's {stage} put into the reference, layer {layer}"
    at_the_logits.ask(question, drift, side="ref", layers=len(ref.layers) - layer)
    return drift


def _at_the_head(goal: Goal, before: float) -> LocatedFault:
    """Final norm or head: which of them, given the reference's last hidden state."""
    model, reference = goal.search.model, goal.search.reference
    normed = reference.final_norm()
    if normed is None:
        return _fault(goal, OUTSIDE, Stage.FINAL_NORM, before=before, after=0.0)
    drift = logit_drift(model.logits(model.boundaries[-1], normed), reference.logits)
    if goal.ask("the reference's final_norm put in", drift, layers=0).healed:
        return _fault(goal, OUTSIDE, Stage.FINAL_NORM, before=before, after=drift)
    return _fault(goal, OUTSIDE, Stage.LM_HEAD, before=drift, after=0.0)


def _fault(
    goal: Goal,
    layer: int,
    stage: Stage,
    *,
    before: float,
    after: float,
    infects: float | None = None,
    parts: Parts | None = None,
) -> LocatedFault:
    model, ref = goal.search.sides
    engine = ref.engine if isinstance(ref, Traced) else None
    accused = accuse(layer, stage, goal.search.files, (model.arithmetic, ref.arithmetic), engine=engine)
    return LocatedFault(
        layer,
        stage,
        before,
        after,
        goal.name,
        infects,
        parts,
        accused.cause,
        accused.next_step,
        accused.confidence,
    )


def _half(goal: Goal, drift: float) -> int:
    """The first boundary from which at most half of the drift is left."""
    low, high = -1, goal.boundary
    while high - low > 1:
        middle = (low + high) // 2
        if goal.put_in(middle).drift <= drift / 2:
            high = middle
        else:
            low = middle
    return high
