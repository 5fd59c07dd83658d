"""Shares added up by what makes them: a tensor, a config key, a choice of the arithmetic; checked by real runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from aprjax.bisect.attribute.metric import Metric
from aprjax.bisect.attribute.report import CauseShare
from aprjax.bisect.attribute.shares import Key, Shares
from aprjax.bisect.attribute.values import Source
from aprjax.bisect.cause import Accusation, of_key, of_tensor
from aprjax.bisect.choices import Choice, Loud, accuse_choices, input_block, loudest, told_apart, words_of
from aprjax.bisect.confidence import Confidence, Level, by_runs
from aprjax.bisect.files import FilesReport
from aprjax.bisect.locate.report import place
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.patching import PatchedModel
from aprjax.bisect.reads import differing_reads
from aprjax.bisect.traced import Side
from aprjax.checkpoint.types import CheckpointError, ModelConfig

# Places listed for a cause: where most of its share comes from.
_PLACES = 3


@dataclass
class Group:
    """One cause while its shares are added up.

    Attributes:
        kind: "tensor", "config", "arithmetic", "rounding" or "unknown".
        names: of tensors and keys, or of choices.
        choices: of an arithmetic.
        integrated, first_order: the sums.
        places: the share of each stage.
    """

    kind: str
    names: tuple[str, ...]
    choices: tuple[Choice, ...] = ()
    integrated: float = 0.0
    first_order: float = 0.0
    places: dict[Key, float] = field(default_factory=dict)

    def add(self, key: Key, integrated: float, first_order: float) -> None:
        """Adds a stage's part."""
        self.integrated += integrated
        self.first_order += first_order
        self.places[key] = self.places.get(key, 0.0) + integrated

    def largest(self) -> list[Key]:
        """The stages that make most of it."""
        return sorted(self.places, key=lambda key: -abs(self.places[key]))


def grouped(
    integrated: Shares, first: Shares, sides: tuple[Side, Side], files: FilesReport | None, config: ModelConfig
) -> list[Group]:
    """Every share under its cause, the largest sum first. The sums add up to all shares."""
    groups: dict[tuple[str, ...], Group] = {}

    def of(kind: str, names: tuple[str, ...], choices: tuple[Choice, ...] = ()) -> Group:
        return groups.setdefault((kind, *names), Group(kind, names, choices))

    for key in integrated.by_position:
        layer, stage = key
        rest, first_rest = integrated.total(key), first.total(key)
        if files is None:
            of("unknown", ()).add(key, rest, first_rest)
            continue
        for name, columns in differing_reads(layer, stage, files, config):
            share, estimate = integrated.from_file(key, columns), first.from_file(key, columns)
            names = tuple(name.split(" and "))
            of("tensor" if files.tensor(names[0]) is not None else "config", names).add(key, share, estimate)
            rest, first_rest = rest - share, first_rest - estimate
        if rest or first_rest:
            choices = told_apart(layer, stage, *sides)
            kind = "arithmetic" if choices else "rounding"
            of(kind, tuple(choice.name for choice in choices), choices).add(key, rest, first_rest)
    return sorted(groups.values(), key=lambda group: -abs(group.integrated))


@dataclass
class RealRuns:
    """Both sides, run for real with a cause exchanged: not the base network with errors added.

    Attributes:
        sources: both sides, after they have run.
        metric: what is looked at.
        values: of both sides as they are.
        weights: what is packed already.
        files: the comparison of the files.
    """

    sources: Mapping[str, Source]
    metric: Metric
    values: Mapping[str, float]
    weights: WeightSource
    files: FilesReport | None

    def heals(self, group: Group) -> float | None:
        """How much of the change goes when the model takes this one thing from the reference."""
        value = self._value("model", "ref", group)
        return None if value is None else self.values["model"] - value

    def infects(self, group: Group) -> float | None:
        """How far the reference changes when it takes this one thing from the model."""
        value = self._value("ref", "model", group)
        return None if value is None else value - self.values["ref"]

    def _value(self, which: str, other: str, group: Group) -> float | None:
        """The metric of one side with the other's; None where it cannot be run so."""
        mine, theirs = self.sources[which], self.sources[other].side
        if mine.model is None or group.kind in ("rounding", "unknown"):
            return None
        try:
            changed = self._changed(mine.model, theirs, group)
        except CheckpointError:  # the other file lacks the tensor, or has it in another shape
            return None
        return None if changed is None else self.metric.value(changed.run())

    def _changed(self, mine: PatchedModel, theirs: Side, group: Group) -> PatchedModel | None:
        if group.kind == "arithmetic":
            arithmetic = mine.runner.arithmetic
            for choice in group.choices:
                arithmetic = choice.put_into(arithmetic, theirs.arithmetic)
            return None if arithmetic == mine.runner.arithmetic else mine.under(arithmetic)
        other = theirs.checkpoint
        if other is None:
            return None
        if group.kind == "tensor":
            mine = mine.exchanging(group.names[0], other, self.weights)
        keys = {name: getattr(other.config, name) for name in group.names[group.kind == "tensor" :]}
        if not keys:
            return mine
        checkpoint = mine.runner.checkpoint
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, **keys))
        runner = Runner(checkpoint, mine.runner.arithmetic)
        return PatchedModel(runner, mine.tokens, mine.rows, self.weights, mine.beside)


def cause_shares(
    groups: list[Group], runs: RealRuns, *, change: float, verify: int, progress: Callable[[str, int, int], None]
) -> tuple[CauseShare, ...]:
    """The groups in words, the largest `verify` of them checked by two real runs each."""
    sides = runs.sources["model"].side, runs.sources["ref"].side
    found = []
    for index, group in enumerate(groups):
        heals = infects = None
        # What makes less than a hundredth of the change is not worth two runs.
        if index < verify and abs(group.integrated) >= 0.01 * abs(change):
            progress("real runs of the largest causes", index, verify)
            heals, infects = runs.heals(group), runs.infects(group)
        accused = _accused(group, sides, runs)
        checked = heals is not None or infects is not None
        confidence = accused.confidence
        if group.kind == "arithmetic" and checked:
            confidence = by_runs(change, heals=heals, infects=infects, of="the metric")
        found.append(
            CauseShare(
                kind=group.kind,
                name=_name(group, sides),
                sentence=accused.cause,
                integrated=group.integrated,
                first_order=group.first_order,
                places=tuple((place(*key), group.places[key]) for key in group.largest()[:_PLACES]),
                infects=infects,
                heals=heals,
                next_step=accused.next_step,
                confidence=confidence,
            )
        )
    return tuple(found)


def _name(group: Group, sides: tuple[Side, Side]) -> str:
    if group.kind == "arithmetic":
        return words_of(group.choices, sides[0], group.largest())
    return " and ".join(group.names) or group.kind


def _accused(group: Group, sides: tuple[Side, Side], runs: RealRuns) -> Accusation:
    model, ref = sides
    if group.kind == "unknown":
        return Accusation(
            "the files are not both at hand",
            "give the files, or put them back where the traces say that they were",
            Confidence(Level.WEAK, "a file's part cannot be told from the arithmetic's"),
        )
    if group.kind == "rounding":
        return Accusation(
            "both sides do the same here and round differently",
            "nothing is broken",
            Confidence(Level.STRONG, "the files agree here, and so do the arithmetics' choices"),
        )
    if group.kind in ("tensor", "config") and runs.files is not None:
        parts = [
            of_key(name, runs.files) if (difference := runs.files.tensor(name)) is None else of_tensor(difference)
            for name in group.names
        ]
        cause = "; ".join(part.cause for part in parts)
        return Accusation(cause, "; ".join(part.next_step for part in parts), parts[0].confidence)
    weak = Confidence(Level.WEAK, "by its share alone: no real run was made")
    return accuse_choices(group.choices, model, ref, group.largest(), weak, loud=_loud(group, runs))


def _loud(group: Group, runs: RealRuns) -> Loud | None:
    """The activation that suffers most, where quantizing activations makes the most of it."""
    layer, stage = group.largest()[0]
    source = runs.sources["model"]
    found = input_block(group.choices, source.side, layer, stage)
    fed = None if found is None else source.value(layer, found[0])
    return None if found is None or fed is None else loudest(fed, found[1])
