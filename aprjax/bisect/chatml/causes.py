"""Why model and reference part: the smallest set of repairs after which they do not.

A repair makes one thing of the model's side the reference's: the wrap of its prompt, its stop tokens, its
token ids, the embedding rows of its special tokens, its arithmetic, its weights. Every repaired condition is
itself a cell of the factorial (or equals one by proof), so that blame is a look-up and not an opinion. A cause is
blamed when repairing it alone makes every comparison alike, and no other repair alone does; or when it
belongs to the only smallest set of repairs that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

from aprjax.bisect.chatml.cells import Comparison, Condition, Factorial
from aprjax.bisect.chatml.partings import Parting, alike, parting

Cause = Literal[
    "double wrapping",
    "stop tokens",
    "special-token ids",
    "tokenizer",
    "special-token rows",
    "drift",
    "block types",
    "weights",
]


@dataclass(frozen=True)
class Causes:
    """What explains that the sides part.

    Attributes:
        partings: every comparison that parts.
        compared: how many comparisons were measured.
        unmeasured: how many were not.
        blamed: the causes: together they explain every parting, and none can be left out.
        alternatives: sets of causes of the same size that explain all of it, where there are several.
        reason: in words.
    """

    partings: tuple[Parting, ...]
    compared: int
    unmeasured: int
    blamed: tuple[Cause, ...]
    alternatives: tuple[tuple[Cause, ...], ...]
    reason: str

    @property
    def verdict(self) -> Literal["alike", "part", "undecidable"]:
        """`part` if any comparison parts; `alike` if all were measured and none does."""
        if self.partings:
            return "part"
        return "alike" if self.compared and not self.unmeasured else "undecidable"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "verdict": self.verdict,
            "blamed": list(self.blamed),
            "alternatives": [list(names) for names in self.alternatives],
            "reason": self.reason,
            "compared": self.compared,
            "unmeasured": self.unmeasured,
            "partings": [asdict(found) for found in self.partings],
        }


def find_causes(factorial: Factorial, comparisons: Sequence[Comparison]) -> Causes:
    """The causes of the partings among these comparisons."""
    outcomes = [alike(factorial, comparison) for comparison in comparisons]
    partings = tuple(found for c in comparisons if (found := parting(factorial, c)) is not None)
    compared = sum(outcome is not None for outcome in outcomes)
    unmeasured = len(outcomes) - compared
    if not partings:
        reason = f"all {compared} comparisons are alike" if compared else "nothing was compared"
        return Causes((), compared, unmeasured, (), (), reason)
    measured = [c for c, outcome in zip(comparisons, outcomes, strict=True) if outcome is not None]
    applicable: list[Cause] = [cause for cause in CAUSES if _applies(cause, factorial, measured)]
    sets = _smallest(factorial, measured, applicable)
    blamed = sets[0] if len(sets) == 1 else ()
    reason = _reason(factorial, partings, compared, sets, applicable)
    return Causes(partings, compared, unmeasured, blamed, tuple(sets) if len(sets) > 1 else (), reason)


CAUSES: tuple[Cause, ...] = get_args(Cause)


def repaired(cause: Cause, model: Condition, ref: Condition, factorial: Factorial) -> Condition:
    """The model's condition with one thing of it made the reference's."""
    match cause:
        case "double wrapping":
            return replace(model, wrap=ref.wrap)
        case "stop tokens":
            stops_of = model.stops_of if _wrong_declared(factorial) else "ref"
            return replace(model, stop=ref.stop, stops_of=stops_of)
        case "special-token ids":
            stops_of = "ref" if _wrong_declared(factorial) else model.stops_of
            return replace(model, ids_of="ref", names_of="ref", stops_of=stops_of)
        case "tokenizer":
            return replace(model, ids_of="ref", names_of="ref")
        case "special-token rows":
            return replace(model, special_rows_of="ref")
        case "drift":
            return replace(model, arithmetic=ref.arithmetic)
        case "block types" | "weights":
            return replace(model, side="ref", special_rows_of="ref")


def _wrong_declared(factorial: Factorial) -> bool:
    """Whether each file declares a stop token that the other does not: an id is wrong, not merely missing."""
    ours, theirs = (factorial.sides[side].declared_stops for side in ("model", "ref"))
    return not (ours <= theirs or theirs <= ours)


def _applies(cause: Cause, factorial: Factorial, comparisons: Sequence[Comparison]) -> bool:
    """Whether the sides differ in what the repair would change."""
    facts, sides = factorial.facts, factorial.sides
    wrong = _wrong_declared(factorial)
    match cause:
        case "double wrapping":
            return any(c.model.wrap != c.ref.wrap for c in comparisons)
        case "stop tokens":
            missing = not wrong and sides["model"].declared_stops != sides["ref"].declared_stops
            return missing or any(c.model.stop != c.ref.stop for c in comparisons)
        case "special-token ids":
            other_names = sides["model"].named_stops != sides["ref"].named_stops
            return wrong or (facts.only_special_ids and bool(facts.ids_differ or facts.special_ids or other_names))
        case "tokenizer":
            return not facts.only_special_ids and bool(facts.ids_differ)
        case "special-token rows":
            return bool(facts.special_rows)
        case "drift":
            return any(c.model.arithmetic != c.ref.arithmetic for c in comparisons)
        case "block types":
            return not facts.identical_weights and facts.equal_values
        case "weights":
            return not (facts.identical_weights or facts.equal_values or facts.only_special_rows)


def _smallest(
    factorial: Factorial, comparisons: Sequence[Comparison], applicable: Sequence[Cause]
) -> list[tuple[Cause, ...]]:
    for size in range(1, len(applicable) + 1):
        found = [names for names in combinations(applicable, size) if _restores(factorial, comparisons, names)]
        if found:
            return found
    return []


def _restores(factorial: Factorial, comparisons: Sequence[Comparison], names: Sequence[Cause]) -> bool:
    """Whether every comparison is alike after the repairs; a condition that was not measured restores nothing."""
    for comparison in comparisons:
        model = comparison.model
        for name in names:
            model = repaired(name, model, comparison.ref, factorial)
        if not alike(factorial, replace(comparison, model=model)):
            return False
    return True


def _reason(
    factorial: Factorial,
    partings: Sequence[Parting],
    compared: int,
    sets: Sequence[tuple[Cause, ...]],
    applicable: Sequence[Cause],
) -> str:
    start = f"{len(partings)} of {compared} comparisons part"
    if not applicable:
        return f"{start}, and the sides differ in nothing that could be made equal"
    if not sets:
        return f"{start}; no set of repairs that was measured makes them alike (tried: {', '.join(applicable)})"
    if len(sets) > 1:
        ways = "; or ".join(" with ".join(names) for names in sets)
        return f"{start}; these cells cannot tell which of several repairs is the cause: {ways}"
    words = " and ".join(in_words(name, factorial, partings) for name in sets[0])
    rest = [name for name in applicable if name not in sets[0]]
    others = f"; repairing only {', or only '.join(rest)} leaves them apart" if rest and len(sets[0]) == 1 else ""
    return f"{start}; they do not once {words}{others}"


def in_words(cause: Cause, factorial: Factorial, partings: Sequence[Parting]) -> str:
    """A repair as the end of a sentence that begins with "they do not once"."""
    facts, sides = factorial.facts, factorial.sides
    first = partings[0].comparison
    match cause:
        case "double wrapping":
            return f"the model's prompt is wrapped {first.ref.wrap} as the reference's, not {first.model.wrap}"
        case "stop tokens":
            ours, theirs = (_ids(sides[side].declared_stops) for side in ("model", "ref"))
            if first.model.stop != first.ref.stop:
                return f"the model ends as the reference does (stop tokens {first.ref.stop}, not {first.model.stop})"
            return f"the model ends at the reference's stop tokens ({theirs}; the model's file declares {ours})"
        case "special-token ids":
            if facts.special_ids:
                names = ", ".join(f"{text} is {ours} for {theirs}" for text, ours, theirs in facts.special_ids[:3])
                return f"the model's special tokens have the reference's ids ({names})"
            if facts.ids_differ:
                return "the model's special tokens are taken for what they are in the reference"
            ours, theirs = (_ids(sides[side].declared_stops) for side in ("model", "ref"))
            return f"the model's file declares the reference's stop token ({theirs}, not {ours})"
        case "tokenizer":
            return "the model is fed the reference's token ids"
        case "special-token rows":
            return f"the rows of {', '.join(facts.special_rows[:3])} are the reference's"
        case "drift":
            return f"the model computes as the reference does ({first.ref.arithmetic}, not {first.model.arithmetic})"
        case "block types" | "weights":
            return f"the model's weights are the reference's ({facts.files_sentence.rstrip('.')})"


def _ids(ids: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "none"
