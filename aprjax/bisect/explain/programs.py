"""The compiled programs of `explain`: matrix products, and the derivative of a node by the parameters of a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.bisect.cause import MATMUL_STAGES, tensors_of
from aprjax.bisect.explain.evaluation import Applied, Evaluation, sources
from aprjax.bisect.explain.hypothesis import Node
from aprjax.bisect.explain.nodes import NodeContext, node_function
from aprjax.bisect.explain.variant import Variant
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
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


@dataclass(frozen=True)
class _Step:
    """One node of a program: what it computes from which values, and which parameters it hangs on."""

    stage: Stage
    inputs: tuple[tuple[str, int], ...]
    touched: tuple[int, ...]


def derivatives(
    evidence: Evidence, base: Evaluation, node: Node, changes: tuple[tuple[Shift, Applied], ...], at: np.ndarray
) -> list[np.ndarray]:
    """The derivatives of a node's value by the parameters of some changes, each `float64[position, width]`.

    The equations are differentiated, not an engine's rounding, which has no derivative: quantized products count as
    products of decoded weights. A fit needs no more: its residuals are of the arithmetic itself.
    """
    active, leaves, steps = _plan(evidence, base, node, changes)
    if node not in active:
        return [np.zeros(base.value(node).shape) for _ in changes]
    variants = tuple(base.variant(step) for step in active)
    shifts = tuple(shift for shift, _ in changes)
    key = (shifts, steps, tuple(map(id, variants)), len(leaves))
    if key not in evidence.programs:
        # The variants are kept with the program: their identities are part of the key.
        evidence.programs[key] = _program(evidence, shifts, steps, variants), variants
    program = evidence.programs[key][0]
    weights = []
    vectors = []
    for step, variant in zip(active, variants, strict=True):
        names = () if step[1] not in MATMUL_STAGES else tensors_of(*step)
        weights.append([evidence.packed(name, variant) for name in names])
        here = evidence.node_context(step, variant)
        vectors.append((here.norm, here.other_norm, here.bias))
    with jax.enable_x64(True):
        values = [np.asarray(base.given(leaf), np.float64) for leaf in leaves]
        found = program(jnp.asarray(at, jnp.float64), values, vectors, weights)
        return [np.asarray(tangent) for tangent in found]


def _plan(
    evidence: Evidence, base: Evaluation, node: Node, changes: tuple[tuple[Shift, Applied], ...]
) -> tuple[list[Node], list[Node], tuple[_Step, ...]]:
    """The nodes that hang on the parameters, the values that they start from, and the steps between."""
    active: list[Node] = []
    leaves: list[Node] = []
    slots: dict[Node, int] = {}
    steps = []
    layers = evidence.config.num_layers
    # Parameters may reach past a node's usual inputs (`needed_inputs`), but what is fitted never does.
    for step in evidence.chain(node):
        touched = tuple(i for i, (_, change) in enumerate(changes) if change.touches(step))
        inputs = dict(sources(step, layers, base.variant(step)))
        if not touched and not any(source in active for source in inputs.values()):
            continue
        for source in inputs.values():
            if source not in slots:
                slots[source] = -len(leaves) - 1
                leaves.append(source)
        steps.append(_Step(step[1], tuple((name, slots[source]) for name, source in inputs.items()), touched))
        slots[step] = len(active)
        active.append(step)
    return active, leaves, tuple(steps)


def _program(evidence: Evidence, shifts: tuple[Shift, ...], steps: tuple[_Step, ...], variants: Any) -> Any:
    config, half = evidence.config, evidence.arithmetic.kv_cache == "float16"
    positions, rows = evidence.positions, list(evidence.head_positions)
    embedded = evidence.embedded(variants[0]) if steps and steps[0].stage is Stage.EMBEDDING else None

    @jax.jit
    def run(at: Array, leaves: list[Array], vectors: list[tuple[Any, Any, Any]], weights: Any) -> list[Array]:
        def value(at: Array) -> Array:
            made: list[Array] = []
            for index, step in enumerate(steps):
                variant = variants[index]
                for which in step.touched:
                    variant = shifts[which](variant, at[which])
                inputs = {name: made[slot] if slot >= 0 else leaves[-slot - 1] for name, slot in step.inputs}
                if step.stage is Stage.FINAL_NORM:
                    inputs["previous"] = inputs["previous"][jnp.asarray(rows)]
                if step.stage is Stage.EMBEDDING:
                    result = jnp.asarray(embedded, jnp.float64)
                elif step.stage in MATMUL_STAGES:
                    (x,) = inputs.values()
                    parts = [multiply(w, x.astype(jnp.float32), PRESETS["float32"]) for w in weights[index]]
                    result = jnp.concatenate(parts, axis=1).astype(jnp.float64)
                else:
                    norm, other, bias = vectors[index]
                    here = NodeContext(jnp, config, half, norm, other, bias)
                    result = node_function(step.stage)(inputs, variant, here, positions)
                factor = variant.factors.get(step.stage)
                made.append(result if factor is None else result * factor)
            return made[-1]

        one = jnp.eye(len(shifts), dtype=at.dtype)
        return [jax.jvp(value, (at,), (one[index],))[1] for index in range(len(shifts))]

    return run
