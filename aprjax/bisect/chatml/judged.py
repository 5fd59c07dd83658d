"""The cells as a reader sees them: text, why it ended, what the gate says of it, repetition, margins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from aprjax.bisect.chatml.cells import SIDES, STOPS, Condition, Factorial, Side, Stop
from aprjax.text.degenerate import TextVerdict, judge_text
from aprjax.text.repetition import Repetition, measure_repetition

# `degenerate`: the upstream gate refuses it. `flagged`: it does, by a rule whose known false positives the text looks
# like (indentation, rulers, another language). `wrong`: a sound text without any expected substring. `loops`: the gate
# lets it pass, but it ends in a loop, which the gate cannot see where a copy is longer than 16 bytes.
State = Literal["clean", "flagged", "wrong", "loops", "degenerate"]
BAD: frozenset[State] = frozenset(("wrong", "loops", "degenerate"))
Decode = Callable[[Sequence[int]], str]


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
        repetition: our own measure: a grade, and the token at which repetition begins.
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
    repetition: Repetition
    first_margin: float
    margins: tuple[float, ...]
    backend: str
    shared_with: str

    @property
    def bad(self) -> bool:
        """Degenerate, looping, or without what was expected."""
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
            "repetition": self.repetition.to_json(),
            "first_margin": self.first_margin,
            "least_margin": self.least_margin,
            "margins": list(self.margins),
            "backend": self.backend,
            "shared_with": self.shared_with or None,
        }


CellKey = tuple[Side, str, str, str, Stop]


def judge_cells(factorial: Factorial, decoders: Mapping[Side, Decode]) -> dict[CellKey, Cell]:
    """Every cell by (side, prompt, wrap, arithmetic, stop), each side with everything its own.

    Args:
        factorial: what was measured; cells without a run are left out.
        decoders: each side's tokens as text.
    """
    cells = {}
    for key in product(SIDES, factorial.prompts, factorial.wraps, factorial.arithmetics, STOPS):
        cell = _cell(factorial, key, decoders)
        if cell is not None:
            cells[key] = cell
    return cells


def _cell(factorial: Factorial, key: CellKey, decoders: Mapping[Side, Decode]) -> Cell | None:
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
    repetition = measure_repetition(answer)
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
        state=state_of(verdict, repetition),
        verdict=verdict,
        expected_found=found,
        repetition=repetition,
        first_margin=margins[0],
        margins=margins,
        backend=run.backend,
        shared_with=run.shared_with,
    )


def state_of(verdict: TextVerdict, repetition: Repetition) -> State:
    """The gate's verdict, graded, and beside it our own measure of repetition."""
    if not verdict.passed and verdict.rule != "expected" and not verdict.false_positive_risk:
        return "degenerate"
    if repetition.grade == "degenerate":
        return "loops"
    if verdict.passed:
        return "clean"
    return "wrong" if verdict.rule == "expected" else "flagged"
