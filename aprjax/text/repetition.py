"""Does a generated text repeat itself, from which token on, and how badly?

Upstream's gate (`aprjax.text.degenerate`) looks for three copies of at most 16 bytes anywhere. A model that falls
into a loop does something else: from some token to the end it says the same again, often with a period of a whole
sentence, which the gate cannot see; and a ruler of equal signs, which the gate refuses, says nothing about the rest.
So this looks at token ids, and first of all at how the text ends.

Two numbers decide. The **loop**: a stretch in which every token is the one a period before it. The **share of
distinct n-grams**, which also falls where copies differ a little; the measure of Li et al. ("A diversity-promoting
objective function for neural conversation models", NAACL 2016), and 1 - seq-rep-4 of Welleck et al. ("Neural text
generation with unlikelihood training", ICLR 2020).

The thresholds come from text that is not degenerate but as repetitive as honest text gets: Python 3.11's standard
library in Qwen2.5's tokens, 2,500 windows each of 16, 24, 32, 64, 128 and 256 tokens, begun anywhere
(`benchmarks/repetition_thresholds.py` prints these numbers: 12 of the 15,000 are mild, one is degenerate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Grade = Literal["none", "mild", "degenerate"]

# Length of n-grams: as in seq-rep-4.
NGRAM = 4
# A loop of three copies at the window's end covered at most 4 tokens in 99.9 % of the windows of each length; those
# few that it filled further are tables of one value. Three times that, and a quarter of the text, is no accident.
DEGENERATE_TOKENS, DEGENERATE_COPIES, DEGENERATE_LOOP_SHARE = 12, 3, 0.25
# A loop of two copies at the end covered at most 7 tokens in 99.9 % of the windows; three copies anywhere 23.
MILD_TOKENS, MILD_COPIES = 8, 2
MILD_INNER_TOKENS, MILD_INNER_COPIES = 24, 3
# The smallest share of distinct 4-grams of any window from 64 tokens on was 0.38, of 99.9 % of them 0.41.
DEGENERATE_DISTINCT, MILD_DISTINCT, DISTINCT_FROM_TOKENS = 0.3, 0.4, 64


@dataclass(frozen=True)
class Loop:
    """A stretch in which every token is the one `period` before it.

    Attributes:
        start: its first token, which begins the first copy.
        end: the token after its last.
        period: in tokens; the shortest that fills the stretch.
    """

    start: int
    end: int
    period: int

    @property
    def tokens(self) -> int:
        """Tokens of all copies."""
        return self.end - self.start

    @property
    def copies(self) -> float:
        """How often the period is said, the first time counted."""
        return self.tokens / self.period


@dataclass(frozen=True)
class Repetition:
    """How far a text repeats itself.

    Attributes:
        tokens: how many were looked at.
        distinct_share: distinct 4-grams by all of them; 1 for a text too short to have two.
        loop: the longest one at the end of the text, else the longest within it; None without any.
        onset: the first token that says again what was said; None where nothing is graded.
        grade: `none`, `mild` (text may be like that) or `degenerate` (text that means something is not).
        reason: the grade in words.
    """

    tokens: int
    distinct_share: float
    loop: Loop | None
    onset: int | None
    grade: Grade
    reason: str

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        loop = None if self.loop is None else {**asdict(self.loop), "copies": round(self.loop.copies, 3)}
        return {**asdict(self), "distinct_share": round(self.distinct_share, 6), "loop": loop}


def measure_repetition(ids: Sequence[int]) -> Repetition:
    """Grades the repetition in a text's token ids (of the completion alone: a prompt may repeat itself)."""
    tokens = np.asarray(ids, np.int64)
    seen = _seen_before(tokens)
    share = 1.0 - float(seen.mean()) if seen.size else 1.0
    at_end, inner = find_loops(tokens)
    loop = at_end or inner
    grade, reason = _grade(tokens.size, share, at_end, inner)
    if grade == "none":
        onset = None
    elif loop is not None and loop.period and _is_graded(grade, loop, at_end, tokens.size):
        onset = loop.start + loop.period
    else:
        onset = _onset(seen)
    return Repetition(tokens.size, share, loop, onset, grade, reason)


def _grade(count: int, share: float, at_end: Loop | None, inner: Loop | None) -> tuple[Grade, str]:
    if at_end is not None and _is_graded("degenerate", at_end, at_end, count):
        return "degenerate", f"the last {_described(at_end)}"
    if count >= DISTINCT_FROM_TOKENS and share < DEGENERATE_DISTINCT:
        return "degenerate", f"{share:.0%} of the 4-grams are distinct"
    if at_end is not None and _is_graded("mild", at_end, at_end, count):
        return "mild", f"the last {_described(at_end)}"
    if inner is not None and _is_graded("mild", inner, at_end, count):
        return "mild", f"from token {inner.start} on, {_described(inner)}"
    if count >= DISTINCT_FROM_TOKENS and share < MILD_DISTINCT:
        return "mild", f"{share:.0%} of the 4-grams are distinct"
    return "none", f"{share:.0%} of the 4-grams are distinct, and no loop is longer than honest text's"


def _is_graded(grade: Grade, loop: Loop, at_end: Loop | None, count: int) -> bool:
    """Whether a loop by itself earns a grade."""
    if loop is not at_end:
        return grade == "mild" and loop.tokens >= MILD_INNER_TOKENS and loop.copies >= MILD_INNER_COPIES
    if grade == "mild":
        return loop.tokens >= MILD_TOKENS and loop.copies >= MILD_COPIES
    enough = loop.tokens >= max(DEGENERATE_TOKENS, DEGENERATE_LOOP_SHARE * count)
    return enough and loop.copies >= DEGENERATE_COPIES


def _described(loop: Loop) -> str:
    return f"{loop.tokens} tokens say the same {loop.period} again and again ({loop.copies:.1f} times)"


def find_loops(tokens: np.ndarray) -> tuple[Loop | None, Loop | None]:
    """The longest loop of two copies at the end, and the longest of three anywhere; the shortest period wins a tie."""
    at_end: Loop | None = None
    inner: Loop | None = None
    size = tokens.size
    for period in range(1, size // 2 + 1):
        edges = np.diff(np.concatenate(([0], tokens[period:] == tokens[:-period], [0])).astype(np.int8))
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if not starts.size:
            continue
        if ends[-1] + period == size and ends[-1] - starts[-1] >= period:
            at_end = _longer(at_end, Loop(int(starts[-1]), size, period))
        longest = int(np.argmax(ends - starts))
        if ends[longest] - starts[longest] >= 2 * period:
            inner = _longer(inner, Loop(int(starts[longest]), int(ends[longest]) + period, period))
    return at_end, inner


def _longer(known: Loop | None, found: Loop) -> Loop:
    return found if known is None or found.tokens > known.tokens else known


def _seen_before(tokens: np.ndarray) -> np.ndarray:
    """Whether the 4-gram that begins at each token occurred before, `bool[tokens - 3]`."""
    if tokens.size < NGRAM:
        return np.zeros(0, bool)
    grams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    _, first = np.unique(grams, axis=0, return_index=True)
    seen = np.ones(len(grams), bool)
    seen[first] = False
    return seen


def _onset(seen: np.ndarray) -> int | None:
    """Where repetition takes over: the start of the end that has most repeated 4-grams beyond new ones."""
    surplus = np.cumsum(np.where(seen, 1, -1)[::-1])[::-1]
    best = int(np.argmax(surplus)) if surplus.size else 0
    return best if surplus.size and surplus[best] > 0 else None
