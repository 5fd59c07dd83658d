"""The words of the search: what a hypothesis is, what it predicts, and what the search came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from aprjax.bisect.explanations.pair import Pair


@dataclass(frozen=True)
class Candidate:
    """One prediction of the model's tensor from the reference's, and how far it misses.

    Attributes:
        sentence: what happened, in words, without a full stop.
        residual: relative L2 of what the prediction leaves, over the rows that it touches; 0.0 where every value
            that was looked at is met bit for bit.
        basis: what the residual was measured on ("all bytes", "all values", "64 sampled rows").
        parameters: of the hypothesis, as plain JSON values.
        sampled: the residual comes from a sample that already speaks against the hypothesis.
        predict: the predicted values of some rows, so that they can be encoded as the model's were.
    """

    sentence: str
    residual: float
    basis: str
    parameters: dict[str, Any] = field(default_factory=dict)
    sampled: bool = False
    predict: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One kind of accident.

    Attributes:
        id: a stable slug.
        test: yields the candidates that pass its cheap checks, and of those that do not, one marked `sampled`.
        next_step: what to do about it.
    """

    id: str
    test: Callable[[Pair], Iterator[Candidate]]
    next_step: str


@dataclass(frozen=True)
class Explanation:
    """The accident that the search settled on; `id` is its hypothesis's, the rest the candidate's."""

    id: str
    sentence: str
    residual: float | None
    basis: str
    parameters: dict[str, Any]
    next_step: str

    @property
    def exact(self) -> bool:
        """Whether it leaves nothing to explain: every byte or value that was looked at is met."""
        return self.residual == 0.0

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "exact": self.exact}


@dataclass(frozen=True)
class Diagnosis:
    """What the search came to.

    Attributes:
        explanation: None where nothing that was tried explains the difference.
        excluded: `(hypothesis, its best residual)` of those tried before, the nearest first.
        remark: what is known without an explanation, in words.
        tolerance: the largest residual that the rounding of the block types explains.
    """

    explanation: Explanation | None
    excluded: tuple[tuple[str, float], ...]
    remark: str
    tolerance: float

    def sentence(self) -> str:
        """In words, without a full stop."""
        if self.explanation is not None:
            return self.explanation.sentence
        if not self.excluded:
            return self.remark
        name, residual = self.excluded[0]
        tried = f"none of {len(self.excluded)} explanations tried fits, the nearest is {name} with residual"
        return f"{self.remark} ({tried} {residual:.2g})"
