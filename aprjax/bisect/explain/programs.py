"""The compiled programs of `explain`: matrix products, and the derivative of a node by the parameters of a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain.evaluation import Applied, Evaluation, sources
from aprjax.bisect.explain.hypothesis import Node
from aprjax.bisect.explain.nodes import NodeContext, node_function
from aprjax.bisect.explain.variant import Variant
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.modules import PackedWeight, multiply
from aprjax.qwen2.stages import Stage

if TYPE_CHECKING:
    from aprjax.bisect.explain.evidence import Evidence

# From a variant and a parameter: the variant with it.
Shift = Callable[[Variant, Any], Variant]


@partial(jax.jit, static_argnames=("arithmetic",))
def multiplied(
    weight: PackedWeight, x: Float[Any, "position in"], *, arithmetic: Arithmetic
) -> Float[Array, "position out"]:
    """`x W^T` as the arithmetic has it."""
    return multiply(weight, jnp.asarray(x).astype(arithmetic.dtype), arithmetic)


def derivatives(evaluation: Evaluation, node: Node, changes: tuple[tuple[Shift, Applied], ...], at: np.ndarray) -> Any:
    """The derivatives of a node's value by the parameters of some changes, a list of `float64[position, width]`.

    Forward mode, node by node: each node's own derivative is a small program, compiled once for all faults and layers.
    The equations are differentiated, not an engine's rounding, which has no derivative: quantized products count as
    products of decoded weights. A fit needs no more: its residuals are of the arithmetic itself.

    Args:
        evaluation: with the parameters at `at`; the changes are its last ones.
        node: whose value it is.
        changes: how each parameter goes into a variant, and where.
        at: the parameters.
    """
    evidence = evaluation.evidence
    layers = evidence.config.num_layers
    found = []
    for index, (shift, change) in enumerate(changes):
        slopes: dict[Node, np.ndarray] = {}
        for step in evidence.chain(node):
            touched = change.touches(step)
            inputs = dict(sources(step, layers, evaluation.variant(step)))
            if touched or any(source in slopes for source in inputs.values()):
                own = (shift, float(at[index])) if touched else None
                slopes[step] = _slope(evaluation, step, inputs, slopes, own)
        found.append(slopes[node] if node in slopes else np.zeros(evaluation.value(node).shape))
    return found


def _slope(
    evaluation: Evaluation,
    step: Node,
    inputs: dict[str, Node],
    slopes: dict[Node, np.ndarray],
    own: tuple[Shift, float] | None,
) -> np.ndarray:
    """The derivative of one node by a parameter, from those of its inputs."""
    evidence, stage = evaluation.evidence, step[1]
    variant = evaluation.variant(step)
    factor = variant.factors.get(stage, 1.0)
    if stage in MATMUL_STAGES or stage is Stage.EMBEDDING:
        # What a parameter can change there besides the inputs is a factor on the whole value.
        total = np.zeros(evaluation.value(step).shape)
        for source in inputs.values():
            if source in slopes:
                plain = replace(variant, activations="as they are")
                total += evidence.product(step, slopes[source], plain) * factor
        if own is not None:
            total += evaluation.value(step) / factor * _factor_slope(own, stage, variant)
        return total
    growth = 0.0 if own is None else _factor_slope(own, stage, variant)
    if growth:
        # A factor on the value needs no program of its own; a fault is one or the other.
        return evaluation.value(step) / factor * growth
    names = tuple(inputs)
    values = [evaluation.given(source).astype(np.float64) for source in inputs.values()]
    tangents = [
        slopes.get(source, np.zeros(value.shape)) for source, value in zip(inputs.values(), values, strict=True)
    ]
    if stage is Stage.FINAL_NORM:
        rows = list(evidence.head_positions)
        values, tangents = [v[rows] for v in values], [t[rows] for t in tangents]
    shift = None if own is None else own[0]
    # A traced parameter takes the place of the number that the variant has now.
    numbers, rest = _without_numbers(variant)
    program = evidence.programs.setdefault((stage, names, shift, rest), None) or _node_program(
        evidence, stage, names, shift, rest
    )
    evidence.programs[stage, names, shift, rest] = program
    here = evidence.node_context(step, variant)
    with jax.enable_x64(True):
        vectors = (here.norm, here.other_norm, here.bias)
        return np.asarray(program(values, tangents, vectors, numbers, 0.0 if own is None else own[1]))


def _factor_slope(own: tuple[Shift, float], stage: Stage, variant: Variant) -> float:
    """By how much the factor on a value grows with the parameter."""
    shift, at = own
    low, high = (shift(replace(variant, factors={}), value).factors.get(stage, 0.0) for value in (at, at + 1.0))
    return float(high - low)


_NUMBERS = (
    "theta",
    "stretch",
    "eps",
    "bias",
    "score_scale",
    "score_cap",
    "temperature",
    "attention_skip",
    "attention_branch",
    "ffn_skip",
    "ffn_branch",
)


def _without_numbers(variant: Variant) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The numbers of a variant, which a program takes as arguments, and the rest, which it is compiled for."""
    numbers = {name: getattr(variant, name) for name in _NUMBERS if getattr(variant, name) is not None}
    choices = tuple(
        (field.name, getattr(variant, field.name))
        for field in fields(variant)
        if field.name not in (*_NUMBERS, "factors", "weights", "activations")
    )
    factors = tuple(sorted((str(stage), float(factor)) for stage, factor in variant.factors.items()))
    return numbers, (choices, factors)


def _node_program(
    evidence: Evidence, stage: Stage, names: tuple[str, ...], shift: Shift | None, rest: tuple[Any, ...]
) -> Any:
    config, half = evidence.config, evidence.arithmetic.kv_cache == "float16"
    positions = evidence.positions
    choices, factors = dict(rest[0]), {Stage(name): factor for name, factor in rest[1]}

    @jax.jit
    def run(values: list[Array], tangents: list[Array], vectors: Any, numbers: dict[str, Any], at: Any) -> Array:
        def value(inputs: list[Array], at: Array) -> Array:
            variant = Variant(**choices, **numbers, factors=factors)
            if shift is not None:
                variant = shift(replace(variant, factors={}) if stage in factors else variant, at)
            norm, other, bias = vectors
            here = NodeContext(jnp, config, half, norm, other, bias)
            result = node_function(stage)(dict(zip(names, inputs, strict=True)), variant, here, positions)
            factor = variant.factors.get(stage)
            return result if factor is None else result * factor

        at = jnp.asarray(at, jnp.float64)
        return jax.jvp(value, (values, at), (tangents, jnp.ones_like(at)))[1]

    return run
