"""From how each value of a trace is read to findings: one for every mistake, whatever layers it was made in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.explain.identity_dump import Key
from aprjax.bisect.explain.identity_finding import IdentityFinding, layers_in_words, places_in_words
from aprjax.bisect.explain.identity_health import execution_order
from aprjax.bisect.explain.identity_match import CLEARLY, CLOSE, Reading
from aprjax.bisect.explain.identity_points import Point, way
from aprjax.bisect.replay.layers import BY_KEY
from aprjax.checkpoint.types import Severity
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, STAGE_INPUTS, Stage

# Stages of the last layer that are needed at every position, whatever the head needs.
_FOR_ALL = (Stage.ATTN_NORM, Stage.QKV_MATMUL, Stage.QKV_BIAS, Stage.K_POST_ROPE)
# Mistakes that an engine could also have made in computing, which then shows in what follows.
_COMPUTED = ("capture-point", "layer-shifted", "rows-reordered", "layout")
# Float arithmetics drift apart by less than this within a layer or two (contracts.md 2.2: 0.44 % for five products).
_NEAR = 0.02
_RANK = {stage: index for index, stage in enumerate(Stage)}
# Positions named in a sentence.
_SHOWN = 6


@dataclass(frozen=True)
class Spread:
    """Sample standard deviations (n - 1, mean taken off) of a stage of the file, as upstream's traces print them.

    Attributes:
        all: over all positions.
        rows: over those that the trace holds.
    """

    all: float
    rows: float

    @property
    def ratio(self) -> float:
        """What a comparison of the two would report."""
        return self.all / self.rows if self.rows else float("inf")

    def __bool__(self) -> bool:
        """Whether the ratio is a number at all."""
        return 0 < self.rows < np.inf and 0 < self.all < np.inf


def spread_of(value: np.ndarray, rows: tuple[int, ...]) -> Spread:
    """The two standard deviations of a file's stage `[position, width]`."""
    return Spread(*(float(part.std(ddof=1, dtype=np.float64)) for part in (value, value[list(rows)])))


def reading_findings(
    readings: Mapping[Key, Reading], spreads: Mapping[Key, Spread], *, count: int, layers: int
) -> Iterator[IdentityFinding]:
    """What the readings of all values come to, grouped by mistake.

    Args:
        readings: by label, those that are as labelled included.
        spreads: of values that hold other positions than all.
        count: positions that were run.
        layers: of the file.
    """
    context = _Context(readings, spreads, count, layers)
    wrong = [readings[key] for key in execution_order(readings) if readings[key].close]
    groups: dict[tuple[str, str], list[Reading]] = {}
    for reading in wrong:
        for kind, words in context.mistakes(reading):
            if not context.contradicted(reading, kind):
                groups.setdefault((kind, words), []).append(reading)
    # What is claimed of whole rows says more than what is claimed of one point.
    for (kind, words), members in groups.items():
        yield context.finding(kind, words, members)


@dataclass(frozen=True)
class _Context:
    readings: Mapping[Key, Reading]
    spreads: Mapping[Key, Spread]
    count: int
    layers: int

    def mistakes(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """`(slug, what the value is)` for everything about a value that is not as labelled."""
        layer, stage = reading.key
        if reading.point != Point(layer, stage):
            other_layer = reading.point.layer not in (layer, OUTSIDE) and reading.point.stage is stage
            if other_layer and not reading.point.variant:
                yield "layer-shifted", f"those of the layer {way(reading.point.layer - layer)}"
            else:
                yield "capture-point", f"{stage}|{reading.point.words(layer, stage)}"
        elif reading.masked:
            yield "capture-point", f"{stage}|its value after the mask"
        if reading.layout:
            yield "layout", reading.layout
        if reading.padding:
            yield "rows-padded", f"{reading.padding}"
        if reading.rows != reading.claimed_rows:
            yield self._rows(reading)

    def _rows(self, reading: Reading) -> tuple[str, str]:
        rows = reading.rows
        if not rows:
            return "rows-averaged", f"one row, the mean over all {self.count} positions"
        if len(rows) == self.count:
            if rows == tuple(range(self.count)):
                return "token-selection", f"all {self.count} positions"
            if rows == tuple(range(self.count))[::-1]:
                return "rows-reordered", "all positions in reverse order"
            steps = {(there - here) % self.count for here, there in enumerate(rows)}
            if len(steps) == 1:
                return (
                    "rows-reordered",
                    f"all positions, shifted by {(min(steps) + self.count // 2) % self.count - self.count // 2:+d}",
                )
            if len(set(rows)) == 1:
                return "token-selection", f"position {rows[0]} in every row"
            return "rows-reordered", f"the positions {_listed(rows)}"
        if self._trimmed(reading):
            return "rows-trimmed", _positions(rows, self.count)
        return "token-selection", _positions(rows, self.count)

    def _trimmed(self, reading: Reading) -> bool:
        """Whether only the last layer lacks positions: engines compute no more than the head needs."""
        layer, stage = reading.key
        # Every position's keys and values are needed: they are not what is left out.
        if stage in _FOR_ALL or layer != self.layers - 1 or not reading.rows or reading.rows[-1] != self.count - 1:
            return False
        behind = [r for key, r in self.readings.items() if key[0] == layer and _RANK[key[1]] > _RANK[stage]]
        if any(r.close and len(r.rows or ()) == self.count for r in behind):
            return False  # what is computed from the missing rows is there
        same = [r for key, r in self.readings.items() if key[1] is stage and OUTSIDE < key[0] < layer and r.close]
        return bool(same) and all(r.rows is not None and len(r.rows) == self.count for r in same)

    def contradicted(self, reading: Reading, kind: str) -> bool:
        """Whether what was computed from the value shows that the engine went on with it: then its label is right."""
        if kind not in _COMPUTED or reading.masked:
            return False
        # What follows from a wrong value is about as far from the file's as the value itself.
        allowed = min(CLOSE, reading.claimed / 2)
        # One that is mislabelled as well must be as near to what it is read as.
        strict = min(allowed, max(CLEARLY * reading.distance, _NEAR))
        return any(
            follower.distance > (allowed if follower.point == Point(*follower.key) else strict)
            for follower in self.followers(reading.key)
        )

    def followers(self, key: Key) -> list[Reading]:
        """Readings of the values that are computed from this one."""
        layer, stage = key
        found = [(layer, consumer) for consumer, inputs in STAGE_INPUTS.items() if stage in inputs]
        if stage is Stage.POST_FFN_RESIDUAL:
            found = [(layer + 1, s) for s in (Stage.ATTN_NORM, Stage.POST_ATTN_RESIDUAL)]
            if layer == self.layers - 1:
                found = [(OUTSIDE, Stage.FINAL_NORM)]
        if stage is Stage.EMBEDDING:
            found = [(0, s) for s in (Stage.ATTN_NORM, Stage.POST_ATTN_RESIDUAL)]
        return [self.readings[key] for key in found if key in self.readings]

    def finding(self, kind: str, words: str, members: list[Reading]) -> IdentityFinding:
        keys = [member.key for member in members]
        where = places_in_words(keys)
        farthest = max(member.distance for member in members)
        evidence = {
            "values": len(members),
            "distance": farthest,
            "from_label": _finite(min((m.claimed for m in members), default=np.inf)),
        }
        what = words.partition("|")[2] or words
        sentence, next_step, severity = _SAID[kind](where, what, members)
        if kind in ("token-selection", "rows-averaged", "rows-trimmed"):
            known = [k for k in keys if self.spreads.get(k) and k[1] not in BY_KEY]
            widest = max(known, key=lambda k: abs(np.log(self.spreads[k].ratio)), default=None)
            if widest is not None and kind == "token-selection":
                told, numbers = self._statistics(widest)
                sentence += told
                evidence |= numbers
            evidence["rows"] = list(members[0].rows or ())
        if kind == "token-selection" and all(m.rows == tuple(range(self.count)) for m in members):
            severity = "info"
        return IdentityFinding(
            kind,
            sentence,
            next_step,
            self._confidence(kind, members, farthest),
            severity=severity,
            stages=tuple(dict.fromkeys(stage for _, stage in keys)),
            layers=tuple(sorted({layer for layer, _ in keys})),
            evidence=evidence,
        )

    def _statistics(self, key: Key) -> tuple[str, dict[str, object]]:
        spread = self.spreads[key]
        layer, stage = key
        at = str(stage) if layer == OUTSIDE else f"{stage} of layer {layer}"
        told = (
            f"; the file's own {at} has a standard deviation of {spread.all:.4g} over all positions and "
            f"{spread.rows:.4g} over these: a ratio of {spread.ratio:.4g} between two traces says nothing of the "
            "computation"
        )
        numbers = {"layer": layer, "stage": str(stage), "all": spread.all, "rows": spread.rows, "ratio": spread.ratio}
        return told, {"standard_deviation": numbers}

    def _confidence(self, kind: str, members: list[Reading], farthest: float) -> Confidence:
        claimed = min(member.claimed for member in members)
        basis = f"within {farthest:.1e} of the file's own value"
        if np.isfinite(claimed) and claimed > farthest:
            basis += f", {claimed:.2g} from what the label says"
        if kind not in _COMPUTED or members[0].masked:
            return Confidence(Level.STRONG, basis)
        # An engine's fault would go on to what is computed from the value.
        followed = [self.followers(member.key) for member in members]
        lacking = sum(not readings for readings in followed)
        if lacking:
            return Confidence(
                Level.WEAK,
                f"{basis}; nothing that is computed from it is in the trace ({lacking} of {len(members)} values), so "
                "an engine that computed so would look the same",
            )
        return Confidence(
            Level.STRONG, f"{basis}; what is computed from it is the file's, so the engine had the right one"
        )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _listed(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (" …" if len(rows) > _SHOWN else "")


def _positions(rows: tuple[int, ...], count: int) -> str:
    if len(rows) == 1:
        named = {count - 1: "the last", 0: "the first"}.get(rows[0])
        return f"position {rows[0]} alone" + (f", {named} of {count}" if named else f" of {count}")
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return f"positions {rows[0]} to {rows[-1]} of {count}"
    return f"{len(rows)} of {count} positions ({_listed(rows)})"


_Said = tuple[str, str, Severity]


def _one(members: list[Reading], singular: str, plural: str) -> str:
    """The verb for the stages that `places_in_words` names."""
    stages = {member.key[1] for member in members}
    return plural if 1 < len(stages) < len(LAYER_STAGES) else singular


def _capture_point(where: str, what: str, members: list[Reading]) -> _Said:
    stage = members[0].key[1]
    return (
        f"{where} {_one(members, 'is', 'are')} not what the name says: {_one(members, 'it holds', 'they hold')} {what}",
        f"dump {stage} where its name says, or compare it with what the other side has at that place",
        "error",
    )


def _layer_shifted(where: str, what: str, members: list[Reading]) -> _Said:
    steps = members[0].point.layer - members[0].key[0]
    return (
        f"{where} {_one(members, 'is', 'are')} labelled by another layer: the values are {what}",
        f"correct the number by {steps:+d} before comparing: what is called {layers_in_words([members[0].key[0]])} is "
        f"{layers_in_words([members[0].point.layer])}",
        "error",
    )


def _selected(where: str, what: str, members: list[Reading]) -> _Said:
    return (
        f"{where} {_one(members, 'holds', 'hold')} {what}",
        "compare the same positions of both sides, or dump them all",
        "error",
    )


def _averaged(where: str, what: str, members: list[Reading]) -> _Said:
    return (
        f"{where} {_one(members, 'holds', 'hold')} {what}",
        "dump the positions themselves: means of different prompts are no values",
        "error",
    )


def _trimmed(where: str, what: str, members: list[Reading]) -> _Said:
    return (
        f"{where} {_one(members, 'holds', 'hold')} {what}: the last layer is trimmed to "
        "the rows that the head needs, as llama.cpp does",
        "compare these rows with the same positions of the other side",
        "info",
    )


def _reordered(where: str, what: str, members: list[Reading]) -> _Said:
    return f"{where} {_one(members, 'holds', 'hold')} {what}", "put the rows in order before comparing", "error"


def _laid_out(where: str, what: str, members: list[Reading]) -> _Said:
    return (
        f"{where} {_one(members, 'lies', 'lie')} in another order than [position, width]: {what}",
        "reorder the axes before comparing",
        "error",
    )


def _padded(where: str, what: str, members: list[Reading]) -> _Said:
    return (
        f"{where} {_one(members, 'has', 'have')} {what} rows of zeros after the last position: a padded batch",
        "cut the padding off; statistics over it are too small",
        "warning",
    )


_SAID: dict[str, Callable[[str, str, list[Reading]], _Said]] = {
    "capture-point": _capture_point,
    "layer-shifted": _layer_shifted,
    "token-selection": _selected,
    "rows-averaged": _averaged,
    "rows-trimmed": _trimmed,
    "rows-reordered": _reordered,
    "layout": _laid_out,
    "rows-padded": _padded,
}
