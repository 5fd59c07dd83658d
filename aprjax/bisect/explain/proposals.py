"""Makes hypotheses of two everyday kinds: a choice made otherwise, and a number that is another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.fit import FitSpec, fit
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Kind, Node, Parameter
from aprjax.bisect.explain.programs import Shift
from aprjax.bisect.explain.unseen import of_a_factor
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

KERNEL = "the file is right here; look at the engine's kernel for {stages}"


def kernel_step(stages: Iterable[Stage], text: str = "") -> str:
    """What to do about a fault of the engine's computation."""
    step = KERNEL.format(stages=", ".join(map(str, stages)))
    return f"{step}: {text}" if text else step


def choice(
    slug: str,
    stages: tuple[Stage, ...],
    sentence: str,
    *,
    kind: Kind = "computation",
    next_step: str = "",
    generalises: tuple[str, ...] = (),
    applies: Callable[[Evidence, Node], bool] = lambda evidence, node: True,
    sets: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Hypothesis:
    """A hypothesis that sets some fields of a `Variant`; `sets` are such with computed names."""
    fields |= sets or {}

    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        if applies(evidence, node):
            yield Candidate(sentence, lambda variant: replace(variant, **fields))

    step = kernel_step(stages)
    return Hypothesis(slug, kind, frozenset(stages), test, next_step or step, step, generalises)


@dataclass(frozen=True)
class Number:
    """A number of a computation that is fitted.

    Attributes:
        name: as it stands in the report's parameters.
        shift: puts it into a variant.
        right: what it is by the file; None where the file has no such thing, `neutral` then.
        neutral: the value that changes nothing, where `right` is None.
        starts: where the search begins, the likeliest last resort last.
        logarithmic: fitted in its logarithm.
        rows: positions that count while the right basin is looked for; None: all.
        unseen: of its `FitSpec`.
    """

    name: str
    shift: Shift
    right: Callable[[ModelConfig], float] | None = None
    neutral: float = 1.0
    starts: Callable[[Evidence, Node], Iterable[float]] | None = None
    logarithmic: bool = False
    rows: int | None = None
    unseen: Callable[[ModelConfig, float], float] = of_a_factor

    def of_file(self, config: ModelConfig) -> float:
        """The value that changes nothing."""
        return self.neutral if self.right is None else self.right(config)


def fitted(
    slug: str,
    stages: tuple[Stage, ...],
    number: Number,
    words: Callable[[float, float, Evidence], str],
    *,
    kind: Kind = "computation",
    next_step: str = "",
    generalises: tuple[str, ...] = (),
    applies: Callable[[Evidence, Node], bool] = lambda evidence, node: True,
) -> Hypothesis:
    """A hypothesis with one fitted number; `words` makes its sentence of the value and its error."""
    spec = FitSpec(number.shift, frozenset(stages), logarithmic=number.logarithmic, unseen=number.unseen)

    def candidate(evidence: Evidence, value: float, error: float | None) -> Candidate:
        shift = number.shift
        known = None if number.right is None else number.right(evidence.config)
        return Candidate(
            words(value, error or 0.0, evidence),
            lambda variant: shift(variant, value),
            parameters={number.name: Parameter(value, error, known)},
            next_step=next_step.format(value=shown(value, error)),
            spec=spec,
            value=value,
            rebuild=lambda new, uncertain: candidate(evidence, new, uncertain),
        )

    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        if not applies(evidence, node):
            return
        start = number.of_file(evidence.config)
        if number.starts is not None:
            options = list(number.starts(evidence, node))
            if not options:
                return
            start = min(options, key=lambda value: misfit(evidence, node, spec, value, number.rows))
        found = fit(evidence, (node,), (spec,), (start,), rows=number.rows)
        if found is not None and number.rows is not None:
            found = fit(evidence, (node,), (spec,), found.values)
        if found is not None:
            proposed = candidate(evidence, found.values[0], found.errors[0])
            idle = abs(found.values[0] - number.of_file(evidence.config)) <= found.errors[0]
            yield replace(proposed, idle=idle)

    step = kernel_step(stages)
    return Hypothesis(slug, kind, frozenset(stages), test, next_step or step, step, generalises)


def misfit(evidence: Evidence, node: Node, spec: FitSpec, value: float, rows: int | None = None) -> float:
    """The sum of squared residuals of one node at a value of a parameter; infinite where it is not finite."""
    import numpy as np

    from aprjax.bisect.explain.fit import squares

    total = squares(evidence, (node,), (spec,), (value,), rows=rows)
    return total if np.isfinite(total) else np.inf


def shown(value: float, error: float | None = None) -> str:
    """A number with as many digits as its error leaves meaning: at most ten."""
    import math

    digits = 6
    if error and value and math.isfinite(error) and math.isfinite(value):
        digits = min(10, max(1, math.ceil(math.log10(abs(value) / error)))) if error < abs(value) else 1
    rounded = float(f"{value:.{digits}g}")
    if 1 <= abs(rounded) < 1e15 and rounded == round(rounded):
        return f"{round(rounded):,}"
    return f"{rounded:,.{digits}g}"


def with_error(value: float, error: float) -> str:
    """`10,000 ± 3`; a smaller error than the last digit shown is left out."""
    text = shown(value, error)
    # An error of a billionth is the fit's, not the world's.
    return text if error <= 1e-9 * abs(value) else f"{text} ± {error:.1g}"
