"""The registry of hypotheses, in the order of simplicity, and the search through it."""

from __future__ import annotations

import numpy as np

from aprjax.bisect.explanations import block_fields, block_types, linear, names, permutations, rearranged
from aprjax.bisect.explanations.block_types import encoded_alike
from aprjax.bisect.explanations.evidence import Candidate, Diagnosis, Explanation, Hypothesis
from aprjax.bisect.explanations.pair import Pair, slices

# The simplest first: of two that leave equally much, the earlier is the explanation.
HYPOTHESES: tuple[Hypothesis, ...] = (
    *linear.ZEROED,
    *block_types.SAME_BYTES,
    *names.HYPOTHESES,
    *block_types.ROUNDED,
    *block_fields.HYPOTHESES,
    *rearranged.HYPOTHESES,
    *permutations.HYPOTHESES,
    *linear.HYPOTHESES,
    *block_types.ENCODED_AGAIN,
)
# A quantizer's search for a scale can leave more than the step's own rounding: ggml's best Q4_K of gaussian weights
# leaves 1.05 times step / sqrt(12), and clipped outliers and six-bit group scales take the rest.
ROUNDINGS_EXPLAINED = 2.0
# A fitted factor takes up a part of what rounding leaves (the square of it, relatively: a quantizer shrinks). So a
# later hypothesis has to leave this much less than a simpler one.
_CLEARLY_LESS = 0.98


def explain(pair: Pair) -> Diagnosis:
    """Looks for the hypothesis that turns the reference's values into the model's.

    One that leaves nothing ends the search at once. Otherwise the one that leaves least is chosen, if that is within
    what rounding to the two block types explains; of equals, the simplest.
    """
    with np.errstate(all="ignore"):
        problem = _not_finite(pair)
        return _search(pair) if problem is None else _accident_of_bytes(pair) or Diagnosis(problem, (), "", 0.0)


def _accident_of_bytes(pair: Pair) -> Diagnosis | None:
    """Of values that are not finite no distance can be taken; but bytes that were read wrongly say why they are not."""
    for hypothesis in block_types.SAME_BYTES:
        for candidate in hypothesis.test(pair):
            if candidate.residual == 0.0 and not candidate.sampled:
                return _settled(pair, hypothesis, candidate, {}, 0.0)
    return None


def _search(pair: Pair) -> Diagnosis:
    tolerance = ROUNDINGS_EXPLAINED * pair.either_rounding
    best: tuple[Hypothesis, Candidate] | None = None
    tried: dict[str, float] = {}
    for hypothesis in HYPOTHESES:
        for candidate in hypothesis.test(pair):
            tried[hypothesis.id] = min(candidate.residual, tried.get(hypothesis.id, np.inf))
            if candidate.residual == 0.0 and not candidate.sampled:
                return _settled(pair, hypothesis, candidate, tried, tolerance)
            if candidate.sampled or not candidate.residual <= tolerance:
                continue
            if best is None or candidate.residual < best[1].residual * _CLEARLY_LESS:
                best = hypothesis, candidate
    if best is not None:
        return _settled(pair, *best, tried, tolerance)
    remark = block_fields.only_field(pair) or "the decoded values differ"
    return Diagnosis(None, _nearest(tried), remark, tolerance)


def _settled(
    pair: Pair, hypothesis: Hypothesis, candidate: Candidate, tried: dict[str, float], tolerance: float
) -> Diagnosis:
    candidate = encoded_alike(pair, candidate)
    found = Explanation(
        hypothesis.id,
        candidate.sentence,
        candidate.residual,
        candidate.basis,
        candidate.parameters,
        hypothesis.next_step,
    )
    others = {name: residual for name, residual in tried.items() if name != hypothesis.id}
    return Diagnosis(found, _nearest(others), "", tolerance)


def _nearest(tried: dict[str, float]) -> tuple[tuple[str, float], ...]:
    finite = [(name, residual) for name, residual in tried.items() if np.isfinite(residual)]
    return tuple(sorted(finite, key=lambda entry: entry[1]))


def _not_finite(pair: Pair) -> Explanation | None:
    """NaN or infinity in the model's tensor: with its place, since no distance can be taken."""
    if pair.rel_l2 is not None or not pair.same_shape:
        return None
    for whose, side in (("model", pair.a), ("reference", pair.b)):
        for window in slices(pair.rows.size, pair.shape[1]):
            values = side.rows(pair.rows[window])
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                row, column = divmod(int(bad[0]), pair.shape[1])
                element = int(pair.rows[window][row]) * pair.shape[1] + column
                return Explanation(
                    "not-finite",
                    f"the {whose}'s values are not finite (first: {values[row, column]} at element {element})",
                    None,
                    "all values",
                    {"side": whose, "element": element},
                    f"the {whose}'s file is damaged here: fetch or convert it again",
                )
    return None
