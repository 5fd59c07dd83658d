"""Fits the continuous parameters of a fault to nodes of a trace, by gradient through the nodes themselves.

Gauss-Newton steps, damped as Levenberg and Marquardt have it (D. Marquardt, SIAM J. Appl. Math. 11, 1963). The
residuals are a trace's values minus what the changed computation gives, every position in units of its own norm, so
that massive positions do not drown the others; derivatives are jax's forward mode (`programs.derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain.evaluation import Applied, Evaluation
from aprjax.bisect.explain.hypothesis import Node
from aprjax.bisect.explain.unseen import UNIT, of_a_factor, pushed, shared_roundings
from aprjax.bisect.replay.layers import visible_part
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

if TYPE_CHECKING:
    from aprjax.bisect.explain.evidence import Evidence
    from aprjax.bisect.explain.programs import Shift

# Of a step, relative to the parameter, below which it makes no difference: float32 traces have 7 digits, and a fit
# over thousands of values a few more.
_SMALLEST_STEP = 1e-9
# A fault that a fit removes shows within so many steps: the squares that must be gone by then.
_TRIALS = {1: 0.02, 4: 0.5}
# A fit that comes so near (in squares) is the right one: what is left are codes of quantized activations that differ.
_NEAR = 0.05
# Each trial halves the step or lessens the squares: twenty halvings are six digits.
_TRIES = 24


@dataclass(frozen=True)
class FitSpec:
    """One continuous parameter.

    Attributes:
        shift: makes a variant one with the parameter.
        stages: whose computation it changes.
        scope: the nodes; None: all of these stages.
        logarithmic: fitted in its logarithm: it is positive, and unknown by orders of magnitude.
        unseen: from a config and a value, by how many roundings (`unseen.UNIT`), relative to it, float32 may have
            changed the number once for all.
    """

    shift: Shift
    stages: frozenset[Stage]
    scope: frozenset[Node] | None = None
    logarithmic: bool = False
    unseen: Callable[[ModelConfig, float], float] = of_a_factor

    def applied(self, value: float) -> Applied:
        """The change with a value of the parameter."""
        shift = self.shift
        return Applied(lambda variant: shift(variant, value), self.stages, self.scope)


@dataclass(frozen=True)
class Fit:
    """What a fit came to.

    Attributes:
        values: of the parameters.
        errors: how far off they may be: as far as what is left could push them if all of it pointed their way
            (an engine's rounding is systematic: a standard error of white noise would be too small by the root of the
            number of values), and as far as float32 may push them without leaving anything (`unseen`).
        squares: the sum of squared residuals, as before and after.
        steps: how many were taken.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    squares: tuple[float, float]
    steps: int


def fit(
    evidence: Evidence,
    nodes: Sequence[Node],
    specs: Sequence[FitSpec],
    start: Sequence[float],
    *,
    rows: int | None = None,
    steps: int = 20,
    settle: bool = False,
) -> Fit | None:
    """Fits parameters jointly; None where they make no difference to these nodes.

    Args:
        evidence: the trace and the file, with the faults accepted so far.
        nodes: what they are fitted to.
        specs: the parameters.
        start: where the search begins.
        rows: only the first positions count; None: all.
        steps: the most that are taken.
        settle: `start` is already near: where activations are quantized, go on by trial.
    """
    problem = _Problem(evidence, tuple(nodes), tuple(specs), rows)
    at = problem.to_free(start)
    residuals = problem.residuals(at)
    squares = first = float(residuals @ residuals)
    if not np.isfinite(squares):
        return None
    damping, taken, gained = 1e-3, 0, 0.0
    step = np.zeros(len(specs))
    slopes, sloped_at = np.zeros((residuals.size, len(specs))), at
    curvature = np.zeros((len(specs), len(specs)))
    for taken in range(1, steps + 1):
        slopes, sloped_at = problem.slopes(at), at
        curvature = slopes.T @ slopes
        if not np.isfinite(curvature).all() or not np.diag(curvature).all():
            return None
        pull = slopes.T @ residuals
        moved = False
        for _ in range(8):
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), pull)
            tried = problem.residuals(at + step)
            total = float(tried @ tried)
            if np.isfinite(total) and total < squares:
                at, residuals, moved = at + step, tried, True
                gained, squares = squares - total, total
                damping = max(damping / 10, 1e-12)
                break
            damping *= 10
        if not moved or np.all(np.abs(step) <= _SMALLEST_STEP * np.maximum(np.abs(at), 1e-3)):
            break
        if gained <= 1e-10 * squares or squares > (1 - _TRIALS.get(taken, 0.0)) * first:
            break
    if len(specs) == 1 and problem.quantized and (settle or squares < _NEAR * first):
        at, squares = _settled(problem, at, squares, curvature)
    errors = problem.errors(sloped_at, slopes, squares)
    # So flat that no error can be told: the number makes no difference.
    if not np.isfinite(errors).all():
        return None
    return Fit(tuple(map(float, problem.values(at))), tuple(map(float, errors)), (first, squares), taken)


def _settled(problem: _Problem, at: np.ndarray, least: float, curvature: np.ndarray) -> tuple[np.ndarray, float]:
    """Goes on by trial where quantized activations make plateaus of the squares, which no gradient leads across."""
    step = np.sqrt(least / curvature[0, 0])
    for _ in range(_TRIES):
        for tried in (at + step, at - step):
            residuals = problem.residuals(tried)
            total = float(residuals @ residuals)
            if total < least:
                at, least = tried, total
                break
        else:
            step = step / 2
        if least == 0 or step <= _SMALLEST_STEP * max(1.0, float(np.abs(at[0]))):
            break
    return at, least


def squares(
    evidence: Evidence,
    nodes: Sequence[Node],
    specs: Sequence[FitSpec],
    values: Sequence[float],
    *,
    rows: int | None = None,
) -> float:
    """The sum of squared residuals at some values of the parameters."""
    problem = _Problem(evidence, tuple(nodes), tuple(specs), rows)
    residuals = problem.residuals(problem.to_free(values))
    return float(residuals @ residuals)


class _Problem:
    """Residuals and slopes of some nodes in the free coordinates: logarithms of positive parameters."""

    def __init__(
        self, evidence: Evidence, nodes: tuple[Node, ...], specs: tuple[FitSpec, ...], rows: int | None
    ) -> None:
        self.evidence, self.specs, self.rows = evidence, specs, rows
        self.nodes = nodes
        self._last: tuple[tuple[float, ...], Evaluation] | None = None
        self._shapes: dict[Node, tuple[int, ...]] = {}
        self.norms = {node: self._row_norms(node) for node in nodes}

    @property
    def quantized(self) -> bool:
        """Whether the way to a node leads through products that quantize their activations."""
        stages = {stage for node in self.nodes for _, stage in self.evidence.chain(node)}
        return self.evidence.arithmetic.matmul != "dequantize" and bool(stages & MATMUL_STAGES)

    def to_free(self, values: Sequence[float]) -> Float[np.ndarray, " parameter"]:
        """Coordinates of the search."""
        pairs = zip(values, self.specs, strict=True)
        return np.array([np.log(value) if spec.logarithmic else value for value, spec in pairs])

    def values(self, at: np.ndarray) -> Float[np.ndarray, " parameter"]:
        """The parameters at some coordinates."""
        with np.errstate(over="ignore"):
            return np.array([np.exp(x) if spec.logarithmic else x for x, spec in zip(at, self.specs, strict=True)])

    def errors(self, at: np.ndarray, slopes: np.ndarray, squares: float) -> Float[np.ndarray, " parameter"]:
        """How far off the parameters may be; infinite where the slopes tell nothing of them.

        Args:
            at: where the slopes were taken.
            slopes: by the coordinates.
            squares: what is left.
        """
        scale = np.linalg.norm(slopes, axis=0)
        if not scale.all():
            return np.full(len(scale), np.inf)
        slopes = slopes / scale
        inverse = np.linalg.pinv(slopes.T @ slopes)
        left = np.sqrt(np.maximum(np.diag(inverse) * squares, 0.0))
        unseen = pushed(slopes, inverse, self._found(), *self._rows())
        values, config = self.values(at), self.evidence.config
        own = [spec.unseen(config, float(value)) * UNIT for spec, value in zip(self.specs, values, strict=True)]
        # Of a logarithm, in the number's own units: a number that rounding hides altogether may be zero.
        units = [value if spec.logarithmic else 1.0 for spec, value in zip(self.specs, values, strict=True)]
        return (left + unseen) / scale * units + np.multiply(own, np.abs(values))

    def _found(self) -> Float[np.ndarray, " value"]:
        """The trace's values, in units of each position's norm."""
        return np.concatenate([self._scaled(node, self._value(node)) for node in self.nodes])

    def _value(self, node: Node) -> np.ndarray:
        value = self.evidence.value(node)
        assert value is not None
        return value.astype(np.float64)

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each position's residuals begin, and how many roundings its values may share."""
        begins, shared, begin = [], [], 0
        config, positions = self.evidence.config, len(self.evidence.positions)
        for node in self.nodes:
            count, width = self._shapes[node]
            count = count if self.rows is None else min(count, self.rows)
            begins.extend(begin + width * np.arange(count))
            begin += count * width
            stages = [stage for _, stage in self.evidence.chain(node)]
            shared.extend([shared_roundings(stages, config, positions)] * count)
        return np.array(begins), np.array(shared)

    def evaluation(self, at: np.ndarray) -> Evaluation:
        """The nodes at some coordinates; the last is kept, since slopes are taken where residuals were."""
        key = tuple(at)
        if self._last is None or self._last[0] != key:
            evaluation = self.evidence.base
            for spec, value in zip(self.specs, self.values(at), strict=True):
                evaluation = evaluation.with_change(spec.applied(float(value)))
            self._last = key, evaluation
        return self._last[1]

    def residuals(self, at: np.ndarray) -> Float[np.ndarray, " value"]:
        """Value minus prediction, in units of each position's norm."""
        evaluation = self.evaluation(at)
        parts = []
        for node in self.nodes:
            with np.errstate(all="ignore"):
                parts.append(self._scaled(node, self._value(node) - evaluation.value(node)))
        return np.concatenate(parts)

    def slopes(self, at: np.ndarray) -> Float[np.ndarray, "value parameter"]:
        """The derivatives of the prediction by the coordinates."""
        from aprjax.bisect.explain.programs import derivatives

        values = self.values(at)
        evaluation = self.evaluation(at)
        changes = tuple((spec.shift, spec.applied(1.0)) for spec in self.specs)
        columns: list[list[np.ndarray]] = [[] for _ in self.specs]
        for node in self.nodes:
            for index, tangent in enumerate(derivatives(evaluation, node, changes, values)):
                factor = values[index] if self.specs[index].logarithmic else 1.0
                columns[index].append(self._scaled(node, tangent * factor))
        return np.stack([np.concatenate(column) for column in columns], axis=1)

    def _scaled(self, node: Node, delta: np.ndarray) -> np.ndarray:
        delta = visible_part(node[1], delta)
        return (delta / self.norms[node])[: self.rows].ravel()

    def _row_norms(self, node: Node) -> np.ndarray:
        seen = visible_part(node[1], self._value(node))
        self._shapes[node] = seen.shape
        norms = np.linalg.norm(seen, axis=1, keepdims=True)
        return np.where(norms > 0, norms, 1.0)
