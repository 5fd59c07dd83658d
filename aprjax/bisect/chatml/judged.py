"""The cells as a reader sees them: text, why it ended, what the gate says of it, repetition, margins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from aprjax.bisect.chatml.cells import SIDES, STOPS, Condition, Factorial, Side, Stop
from aprjax.text.degenerate import TextVerdict, judge_text

# `wrong`: a sound text without any expected substring. `flagged`: the gate refuses it, by a rule whose known
# false positives it looks like (indentation, rulers, another language).
State = Literal["clean", "flagged", "wrong", "degenerate"]
BAD: frozenset[State] = frozenset(("wrong", "degenerate"))
Decode = Callable[[Sequence[int]], str]
Onset = Callable[[Sequence[int]], int | None]


@dataclass(frozen=True)
class Cell:
    """One cell of the factorial.

    Attributes:
        side: model or ref.
        prompt: its name.
        wrap: none, once or twice.
        arithmetic: a preset's name.
        stop: on, declared or off.
        tokens: the completion, without the stop token that ended it.
        text: of these tokens, special tokens written out.
        stop_reason: `stop token` or `budget`.
        stop_token: the one that ended it.
        state: see `State`.
        verdict: the upstream gate's.
        expected_found: whether an expected substring occurs; None where none is expected.
        onset: the token at which repetition begins, by our own measure; None where it does not.
        first_margin: top-1 less top-2 at the first token, in logits.
        margins: the same at every token.
        backend: what computed it.
        shared_with: the run that this one's tokens were taken from by proof.
    """

    side: Side
    prompt: str
    wrap: str
    arithmetic: str
    stop: Stop
    tokens: tuple[int, ...]
    text: str
    stop_reason: Literal["stop token", "budget"]
    stop_token: int | None
    state: State
    verdict: TextVerdict
    expected_found: bool | None
    onset: int | None
    first_margin: float
    margins: tuple[float, ...]
    backend: str
    shared_with: str

    @property
    def bad(self) -> bool:
        """Degenerate, or without what was expected."""
        return self.state in BAD

    @property
    def least_margin(self) -> float:
        """The smallest margin of the completion."""
        return min(self.margins)

    @property
    def label(self) -> str:
        """The cell in a few words."""
        return f"{self.side} {self.prompt} · wrap {self.wrap} · {self.arithmetic} · stop {self.stop}"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "side": self.side,
            "prompt": self.prompt,
            "wrap": self.wrap,
            "arithmetic": self.arithmetic,
            "stop": self.stop,
            "state": self.state,
            "text": self.text,
            "tokens": list(self.tokens),
            "stop_reason": self.stop_reason,
            "stop_token": self.stop_token,
            "gate": {"passed": self.verdict.passed, "rule": self.verdict.rule, "detail": self.verdict.detail},
            "false_positive_risk": self.verdict.false_positive_risk,
            "expected_found": self.expected_found,
            "repetition_onset": self.onset,
            "first_margin": self.first_margin,
            "least_margin": self.least_margin,
            "margins": list(self.margins),
            "backend": self.backend,
            "shared_with": self.shared_with or None,
        }


CellKey = tuple[Side, str, str, str, Stop]


def judge_cells(factorial: Factorial, decoders: Mapping[Side, Decode], onset: Onset) -> dict[CellKey, Cell]:
    """Every cell by (side, prompt, wrap, arithmetic, stop), each side with everything its own.

    Args:
        factorial: what was measured; cells without a run are left out.
        decoders: each side's tokens as text.
        onset: the token at which repetition begins.
    """
    cells = {}
    for key in product(SIDES, factorial.prompts, factorial.wraps, factorial.arithmetics, STOPS):
        cell = _cell(factorial, key, decoders, onset)
        if cell is not None:
            cells[key] = cell
    return cells


def _cell(factorial: Factorial, key: CellKey, decoders: Mapping[Side, Decode], onset: Onset) -> Cell | None:
    side, name, wrap, arithmetic, stop = key
    condition = Condition.as_run(side, wrap, arithmetic, stop)
    run, outcome = factorial.run_of(name, condition), factorial.outcome(name, condition)
    if run is None or outcome is None:
        return None
    prompt = factorial.prompts[name]
    answer = outcome.tokens[:-1] if outcome.stopped else outcome.tokens
    text = decoders[side](answer)
    # The expected substrings are those of an answer: upstream asks them of the wrapped prompt only.
    expected = prompt.expected if wrap != "none" else ()
    verdict = judge_text(text, expected=expected, prompt=prompt.fed(wrap))
    found = any(part.lower() in verdict.judged.lower() for part in expected) if expected else None
    margins = run.margins[: len(outcome.tokens)]
    return Cell(
        side=side,
        prompt=name,
        wrap=wrap,
        arithmetic=arithmetic,
        stop=stop,
        tokens=answer,
        text=text,
        stop_reason="stop token" if outcome.stopped else "budget",
        stop_token=outcome.tokens[-1] if outcome.stopped else None,
        state=state_of(verdict),
        verdict=verdict,
        expected_found=found,
        onset=onset(answer),
        first_margin=margins[0],
        margins=margins,
        backend=run.backend,
        shared_with=run.shared_with,
    )


def state_of(verdict: TextVerdict) -> State:
    """The gate's verdict, graded."""
    if verdict.passed:
        return "clean"
    if verdict.rule == "expected":
        return "wrong"
    return "flagged" if verdict.false_positive_risk else "degenerate"
