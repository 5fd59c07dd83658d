"""How sure a report is of the cause that it names, and what that rests on.

No probabilities: nobody knows how often which accident happens. A level says what kind of proof there is, the basis
has its numbers, so that a reader can judge by other standards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """What kind of proof a cause has."""

    CERTAIN = "certain"
    """Nothing is left to explain: the prediction equals what was found, bit for bit, wherever it was looked at."""
    STRONG = "strong"
    """What is left lies within what rounding explains, and nothing else that was tried comes as near."""
    WEAK = "weak"
    """More is left than rounding explains, or something else explains as much."""


@dataclass(frozen=True)
class Confidence:
    """How sure a cause is.

    Attributes:
        level: the kind of proof.
        basis: what it rests on, with its numbers; a sentence without a full stop.
    """

    level: Level
    basis: str

    def sentence(self) -> str:
        """Both in words: `certain: …`."""
        return f"{self.level}: {self.basis}"

    def to_json(self) -> dict[str, str]:
        """A dict of plain JSON values."""
        return {**asdict(self), "level": str(self.level)}


def by_runs(before: float, *, heals: float | None, infects: float | None, of: str) -> Confidence:
    """The confidence in a cause by real runs: it alone taken out of the model, and alone put into the reference.

    Args:
        before: the whole change.
        heals: how much of it goes with the cause; None where the model could not be run without it.
        infects: how much the reference takes on with it; None where it could not be run with it.
        of: what changes, in words ("the margin").
    """
    parts = []
    if heals is not None:
        parts.append(f"without it {of} changes by {before - heals:+.3g} instead of {before:+.3g}")
    if infects is not None:
        parts.append(f"it alone changes the reference's by {infects:+.3g}")
    if not parts:
        return Confidence(Level.WEAK, "no real run could be made with it or without it")
    # Half of the change in both directions: no other cause can then be as large in either.
    most = all(abs(found) > abs(before) / 2 and found * before > 0 for found in (heals, infects) if found is not None)
    return Confidence(Level.STRONG if most else Level.WEAK, "; ".join(parts))


def by_residual(
    residual: float,
    floor: float,
    *,
    measured_on: str = "",
    next_best: tuple[str, float] | None = None,
) -> Confidence:
    """The confidence in a prediction by what it leaves, next to what rounding explains and to the next best guess.

    Args:
        residual: relative size of what the prediction leaves; 0.0 where it is met bit for bit.
        floor: the largest residual that rounding explains.
        measured_on: what the residual was measured on, in words ("all values", "64 sampled rows").
        next_best: the nearest other hypothesis and its residual; None where none was tried.
    """
    where = f" ({measured_on})" if measured_on else ""
    if residual == 0.0:
        return Confidence(Level.CERTAIN, f"the prediction is met bit for bit{where}")
    basis = f"residual {residual:.2g}{where} against {floor:.2g} that rounding explains"
    if next_best is not None:
        basis += f"; the next best hypothesis, {next_best[0]}, leaves {next_best[1]:.2g}"
    # Of two that both lie within rounding, the residual cannot say which it was.
    alone = next_best is None or next_best[1] > floor
    return Confidence(Level.STRONG if residual <= floor and alone else Level.WEAK, basis)
