"""What two files say of the claims that upstream made about ChatML. `docs/chatml.md` has the rules in words.

Every claim is decided by contrasts: two cells that differ in one factor. The reference's cells are contrasted;
where the model's differ from them, `causes` says why, and a cause that it blames supports its claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from aprjax.bisect.chatml.causes import Cause, Causes
from aprjax.bisect.chatml.cells import Factorial, FirstLogits
from aprjax.bisect.chatml.judged import Cell, CellKey
from aprjax.bisect.chatml.partings import first_difference

ClaimVerdict = Literal["supported", "refuted", "not decidable"]

# FALSIFY-CPU-GPU-002 of apr-cpu-vs-gpu-output-parity-v1: cosine of the last logits; -001: equal argmax.
PARITY_COSINE = 0.99


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
        id: stable slug.
        claim: in words.
        verdict: supported, refuted, or not decidable by these two files.
        reason: in words, with counts.
        evidence: the cells that decide it.
    """

    id: str
    claim: str
    verdict: ClaimVerdict
    reason: str
    evidence: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


Cells = Mapping[CellKey, Cell]


def judge_claims(factorial: Factorial, cells: Cells, causes: Causes) -> tuple[Claim, ...]:
    """Every claim, in the order in which upstream made them."""
    return (
        _forward_parity(factorial),
        _chatml_path(factorial, cells, causes),
        _special_tokens(factorial, cells, causes),
        _drift(factorial, cells, causes),
        _stop_tokens(cells, causes),
        _double_wrapping(factorial, cells, causes),
    )


def _forward_parity(factorial: Factorial) -> Claim:
    words = "forward parity at the prompt implies generation parity"
    near = [pair for pair in factorial.first_logits if pair.same_top1 and pair.cosine >= PARITY_COSINE]
    rule = f"the same first token and a cosine of at least {PARITY_COSINE}"
    if not near:
        return Claim("forward-parity", words, "not decidable", f"no two runs have forward parity ({rule})")
    apart = [(pair, step) for pair in near if (step := _first_step(factorial, pair)) is not None]
    if apart:
        least = min(pair.cosine for pair, _ in apart)
        reason = (
            f"{len(apart)} of {len(near)} pairs of runs with forward parity ({rule}) go on to other tokens, from token "
            f"{min(step for _, step in apart)} at the earliest; their cosines are {least:.6f} and above"
        )
        return Claim("forward-parity", words, "refuted", reason, tuple(_pair(pair) for pair, _ in apart))
    computed = [pair for pair in near if not _by_proof(factorial, pair)]
    if not computed:
        reason = "the only pairs with forward parity are runs that are the same by proof, which says nothing"
        return Claim("forward-parity", words, "not decidable", reason)
    reason = (
        f"all {len(computed)} pairs of separate runs with forward parity ({rule}) go on alike for "
        f"{factorial.max_new_tokens} tokens: these files do not refute it"
    )
    return Claim("forward-parity", words, "supported", reason, tuple(_pair(pair) for pair in computed))


def _first_step(factorial: Factorial, pair: FirstLogits) -> int | None:
    left, right = (factorial.runs[key].tokens for key in (pair.left, pair.right))
    return None if left == right else first_difference(left, right)


def _by_proof(factorial: Factorial, pair: FirstLogits) -> bool:
    return pair.left.arithmetic == pair.right.arithmetic and any(
        factorial.runs[key].shared_with for key in (pair.left, pair.right)
    )


def _pair(pair: FirstLogits) -> str:
    left, right = pair.left, pair.right
    return f"{left.prompt} · wrap {left.wrap}: {left.side} {left.arithmetic} and {right.side} {right.arithmetic}"


def _chatml_path(factorial: Factorial, cells: Cells, causes: Causes) -> Claim:
    words = "the ChatML path is at fault"
    if not {"none", "once"} <= set(factorial.wraps):
        return Claim("chatml-path", words, "not decidable", "it takes the wraps none and once")
    harmed, judged = _contrast(cells, "wrap", "none", "once", stop="on", expected=False)
    if harmed:
        reason = (
            f"{len(harmed)} of {judged} answers that are sound raw go bad when the prompt is wrapped once, "
            "through the same code path"
        )
        return Claim("chatml-path", words, "supported", reason, tuple(cell.label for cell in harmed))
    apart = [p for p in causes.partings if p.comparison.model.wrap != "none"]
    raw = [p for p in causes.partings if p.comparison.model.wrap == "none"]
    if apart and not raw and not set(causes.blamed) - {"weights", "block types"}:
        reason = (
            f"the sides part under ChatML only ({len(apart)} comparisons), but their weights differ too: wide "
            "margins may hide that from raw prompts"
            if causes.blamed
            else f"the sides part under ChatML only ({len(apart)} comparisons), for no cause that was found"
        )
        return Claim("chatml-path", words, "not decidable", reason)
    reason = (
        f"fed the same ids through one code path, {judged} of {judged} answers that are sound raw stay sound when the "
        "prompt is wrapped once"
    )
    if apart:
        reason += f"; that the sides part has another cause ({', '.join(causes.blamed) or 'raw prompts part too'})"
    return Claim("chatml-path", words, "refuted", reason) if judged else _nothing("chatml-path", words)


def _special_tokens(factorial: Factorial, cells: Cells, causes: Causes) -> Claim:
    words = "special tokens are at fault"
    blamed = _blamed(causes, "special-token ids", "special-token rows")
    if blamed:
        return Claim("special-tokens", words, "supported", causes.reason, _evidence(causes))
    if not all(side.has_tokenizer for side in factorial.sides.values()):
        return Claim("special-tokens", words, "not decidable", "one file has no tokenizer to compare")
    if not {"once", "twice"} & set(factorial.wraps):
        return Claim("special-tokens", words, "not decidable", "no prompt with special tokens was run")
    facts = factorial.facts
    if causes.alternatives or (facts.special_rows and causes.partings and not causes.blamed):
        return Claim("special-tokens", words, "not decidable", causes.reason)
    harmed, judged = _contrast(cells, "wrap", "none", "once", stop="on", expected=False)
    if harmed:
        reason = "wrapped prompts go bad on both sides alike: what two files share, their comparison cannot accuse"
        return Claim("special-tokens", words, "not decidable", reason, tuple(cell.label for cell in harmed))
    parts = []
    if facts.special_ids or facts.ids_differ:
        names = ", ".join(text for text, _, _ in facts.special_ids[:3]) or "some"
        parts.append(f"ids of special tokens differ ({names}), but no cell parts by that")
    else:
        parts.append("both tokenizers give them the same ids")
    if facts.special_rows:
        parts.append(f"rows of {', '.join(facts.special_rows[:3])} differ, but no cell parts by that")
    else:
        parts.append("their embedding and head rows are the same bytes")
    reason = " and ".join(parts)
    if judged:
        reason += f"; {judged} of {judged} sound answers stay sound when the prompt is wrapped"
    return Claim("special-tokens", words, "refuted", reason)


def _drift(factorial: Factorial, cells: Cells, causes: Causes) -> Claim:
    words = "drift of the arithmetic is at fault"
    if _blamed(causes, "drift"):
        return Claim("drift", words, "supported", causes.reason, _evidence(causes))
    names = factorial.arithmetics
    if len(names) < 2:
        return Claim("drift", words, "not decidable", "it takes two arithmetics")
    harmed: list[Cell] = []
    judged = 0
    for good in names:
        for other in names:
            if good != other:
                found, count = _contrast(cells, "arithmetic", good, other, stop="on")
                harmed += found
                judged += count
    unique = tuple(dict.fromkeys(cell.label for cell in harmed))
    if harmed:
        reason = f"{len(unique)} cells are bad under one arithmetic and sound under another, of one file and one prompt"
        return Claim("drift", words, "supported", reason, unique)
    if not judged:
        return _nothing("drift", words)
    apart = _parted_by_arithmetic(factorial)
    reason = f"no prompt goes bad under one of {', '.join(names)} and stays sound under another"
    return Claim("drift", words, "refuted", reason + (f"; {apart}" if apart else "; all tokens are the same, too"))


def _parted_by_arithmetic(factorial: Factorial) -> str:
    """How many runs of the reference other arithmetics move to other tokens, and across which margins."""
    first, *others = factorial.arithmetics
    margins, total = [], 0
    for key, run in factorial.runs.items():
        if key.side != "ref" or key.arithmetic not in others:
            continue
        base = factorial.runs.get(replace(key, arithmetic=first))
        if base is None:
            continue
        total += 1
        if base.tokens != run.tokens:
            margins.append(base.margins[first_difference(base.tokens, run.tokens)])
    if not margins:
        return ""
    return (
        f"{len(margins)} of {total} continuations do take other tokens than under {first}, across margins of "
        f"{max(margins):.3g} logits at most"
    )


def _stop_tokens(cells: Cells, causes: Causes) -> Claim:
    words = "missing stop tokens are at fault"
    if _blamed(causes, "stop tokens"):
        return Claim("stop-tokens", words, "supported", causes.reason, _evidence(causes))
    harmed, judged = _contrast(cells, "stop", "on", "off")
    ended = [c for c in cells.values() if c.side == "ref" and c.stop == "on" and c.stop_reason == "stop token"]
    if harmed:
        reason = f"{len(harmed)} of {judged} answers that are sound with stop tokens go bad when nothing ends them"
        return Claim("stop-tokens", words, "supported", reason, tuple(cell.label for cell in harmed))
    if not ended:
        reason = "no answer reached a stop token within the budget: give it more (--max-new-tokens)"
        return Claim("stop-tokens", words, "not decidable", reason)
    ran = max(len(cells[(*_key(c)[:4], "off")].tokens) - len(c.tokens) for c in ended)
    reason = (
        f"{len(ended)} answers run past their end when nothing stops them, by up to {ran} tokens, and none goes bad by "
        "it within the budget (upstream's gate gives 512 tokens)"
    )
    return Claim("stop-tokens", words, "refuted", reason)


def _double_wrapping(factorial: Factorial, cells: Cells, causes: Causes) -> Claim:
    words = "wrapping twice is at fault"
    if _blamed(causes, "double wrapping"):
        return Claim("double-wrapping", words, "supported", causes.reason, _evidence(causes))
    if not {"once", "twice"} <= set(factorial.wraps):
        return Claim("double-wrapping", words, "not decidable", "it takes the wraps once and twice")
    harmed, judged = _contrast(cells, "wrap", "once", "twice", stop="on")
    if harmed:
        reason = f"{len(harmed)} of {judged} answers that are sound when wrapped once go bad when wrapped twice"
        return Claim("double-wrapping", words, "supported", reason, tuple(cell.label for cell in harmed))
    if not judged:
        return _nothing("double-wrapping", words)
    return Claim(
        "double-wrapping", words, "refuted", f"{judged} of {judged} sound answers stay sound when wrapped twice"
    )


_FACTORS = {"wrap": 2, "arithmetic": 3, "stop": 4}


def _contrast(
    cells: Cells, factor: str, good: str, other: str, *, stop: str | None = None, expected: bool = True
) -> tuple[list[Cell], int]:
    """Of the reference's cells at `good` that are not bad: those bad at `other`, all else equal; and their number.

    Without `expected` an answer is bad only when it is degenerate or loops: raw prompts have no expected substrings.
    """
    harmed, judged = [], 0
    place = _FACTORS[factor]
    for key, cell in cells.items():
        if key[0] != "ref" or key[place] != good or (stop is not None and key[4] != stop) or cell.bad:
            continue
        # The checker loses the length of a tuple put together from slices.
        contrasted = cells.get((*key[:place], other, *key[place + 1 :]))  # pyright: ignore[reportArgumentType]
        if contrasted is None:
            continue
        judged += 1
        if contrasted.state in ("degenerate", "loops") or (expected and contrasted.bad):
            harmed.append(contrasted)
    return harmed, judged


def _blamed(causes: Causes, *names: Cause) -> bool:
    return any(name in causes.blamed for name in names)


def _evidence(causes: Causes) -> tuple[str, ...]:
    found = []
    for parted in causes.partings:
        model, ref = parted.comparison.model, parted.comparison.ref
        sides = f"{model.wrap}/{model.arithmetic}/{model.stop}", f"{ref.wrap}/{ref.arithmetic}/{ref.stop}"
        what = sides[0] if sides[0] == sides[1] else f"{sides[0]} against {sides[1]}"
        found.append(f"{parted.comparison.prompt} · {what}: {parted.kind} at token {parted.step}")
    return tuple(found)


def _key(cell: Cell) -> CellKey:
    return cell.side, cell.prompt, cell.wrap, cell.arithmetic, cell.stop


def _nothing(slug: str, words: str) -> Claim:
    return Claim(slug, words, "not decidable", "the reference has no sound answer to set against another")
