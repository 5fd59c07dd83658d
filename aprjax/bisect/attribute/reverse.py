"""The base network with errors added, forwards and backwards, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.bisect.attribute.metric import Metric
from aprjax.bisect.attribute.values import Errors
from aprjax.bisect.patching import PatchedModel
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.model import precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context, DecoderLayer, PackedWeight, RMSNorm
from aprjax.qwen2.stages import OUTSIDE, Stage


@partial(jax.jit, static_argnames=("arithmetic",))
def _forward(
    layer: DecoderLayer,
    hidden: Float[Array, "position hidden"],
    context: Context,
    added: dict[Stage, Array],
    *,
    arithmetic: Arithmetic,
) -> Array:
    return run_layer(layer, hidden, context, {}, added, arithmetic=arithmetic, capture=False)[0]


@partial(jax.jit, static_argnames=("arithmetic",))
def _backward(
    layer: DecoderLayer,
    hidden: Float[Array, "position hidden"],
    context: Context,
    added: dict[Stage, Array],
    cotangent: Float[Array, "position hidden"],
    *,
    arithmetic: Arithmetic,
) -> tuple[Array, dict[Stage, Array]]:
    """The gradients with respect to the layer's input and to what was added at each stage."""

    def forward(hidden: Array, added: dict[Stage, Array]) -> Array:
        return run_layer(layer, hidden, context, {}, added, arithmetic=arithmetic, capture=False)[0]

    return jax.vjp(forward, hidden, added)[1](cotangent)


@partial(jax.jit, static_argnames=("arithmetic",))
def _head(
    norm: RMSNorm,
    head: PackedWeight,
    hidden: Float[Array, "position hidden"],
    added: tuple[Array, Array],
    metric: Metric,
    *,
    arithmetic: Arithmetic,
) -> tuple[Array, tuple[Array, tuple[Array, Array]]]:
    """The metric, and its gradients with respect to the hidden state and to what was added behind it."""

    def value(hidden: Array, added: tuple[Array, Array]) -> Array:
        normed = run_norm(norm, hidden, arithmetic=arithmetic) + added[0]
        return metric(run_head(head, normed, arithmetic=arithmetic) + added[1])

    return jax.value_and_grad(value, argnums=(0, 1))(hidden, added)


class Perturbed:
    """The base network with errors added at its stages."""

    def __init__(self, base: PatchedModel, metric: Metric) -> None:
        self.base, self.metric = base, metric
        self.arithmetic = base.runner.arithmetic
        self.forwards = self.backwards = 0

    def value(self, added: Callable[[int], Mapping[Stage, np.ndarray]]) -> float:
        """The metric with `added(layer)` at every layer's stages, and `added(-1)` outside the layers."""
        hidden = self._run(added)[-1]
        return self._at_the_head(hidden, added(OUTSIDE))[0]

    def gradients(
        self, added: Callable[[int], Mapping[Stage, np.ndarray]]
    ) -> Iterator[tuple[int, dict[Stage, np.ndarray]]]:
        """(layer, gradient by stage), from the head down to the embedding; layer -1 comes first and last.

        What is added must name every stage whose gradient is wanted.
        """
        inputs = self._run(added)
        outside = added(OUTSIDE)
        _, cotangent, at_the_head = self._at_the_head(inputs[-1], outside)
        yield OUTSIDE, at_the_head
        self.backwards += 1
        with precision_scope(self.arithmetic):
            for index in reversed(range(len(self.base.layers))):
                here = self._arrays(added(index))
                layer, context = self.base.layers[index], self.base.context
                cotangent, gradient = _backward(
                    layer, jnp.asarray(inputs[index]), context, here, cotangent, arithmetic=self.arithmetic
                )
                yield index, {stage: np.asarray(value) for stage, value in gradient.items()}
        yield OUTSIDE, {Stage.EMBEDDING: np.asarray(cotangent)}

    def _run(self, added: Callable[[int], Mapping[Stage, np.ndarray]]) -> list[np.ndarray]:
        """The value at every boundary."""
        self.forwards += 1
        hidden = self.base.embedded.astype(self.arithmetic.dtype)
        start = added(OUTSIDE).get(Stage.EMBEDDING)
        if start is not None:
            hidden = hidden + start
        inputs = [hidden]
        with precision_scope(self.arithmetic):
            for index, layer in enumerate(self.base.layers):
                here = self._arrays(added(index))
                output = _forward(layer, jnp.asarray(inputs[-1]), self.base.context, here, arithmetic=self.arithmetic)
                inputs.append(np.asarray(output))
        return inputs

    def _at_the_head(
        self, hidden: np.ndarray, added: Mapping[Stage, np.ndarray]
    ) -> tuple[float, Array, dict[Stage, np.ndarray]]:
        """The metric, its gradient at the last boundary, and those at the final norm and the logits."""
        base, dtype, rows = self.base, self.arithmetic.dtype, self.base.rows
        with precision_scope(self.arithmetic):
            chosen = jnp.asarray(hidden[rows])
            width = self.metric.log_p.shape[1]
            zeros = np.zeros((len(rows), width), dtype), np.zeros((len(rows), hidden.shape[1]), dtype)
            behind = (added.get(Stage.FINAL_NORM, zeros[1]), added.get(Stage.LM_HEAD, zeros[0]))
            value, (at_hidden, (at_norm, at_logits)) = _head(
                base.norm,
                base.head,
                chosen,
                (jnp.asarray(behind[0]), jnp.asarray(behind[1])),
                self.metric,
                arithmetic=self.arithmetic,
            )
            cotangent = jnp.zeros(hidden.shape, dtype).at[jnp.asarray(rows)].add(at_hidden)
        found = {Stage.FINAL_NORM: np.asarray(at_norm), Stage.LM_HEAD: np.asarray(at_logits)}
        return float(value), cotangent, found

    def _arrays(self, added: Mapping[Stage, np.ndarray]) -> dict[Stage, Any]:
        return {stage: jnp.asarray(np.asarray(value, self.arithmetic.dtype)) for stage, value in added.items()}


def mixture(model: Errors, ref: Errors, base: PatchedModel, share: float) -> Callable[[int], dict[Stage, np.ndarray]]:
    """What to add at each layer, `share` of the way from the reference's errors to the model's.

    Every stage that either side has an error at is named, so that all layers have the same stages where one has.
    """
    length = len(base.embedded)
    stages = {stage for errors in (model, ref) for (layer, stage) in errors.values if layer != OUTSIDE}

    def added(layer: int) -> dict[Stage, np.ndarray]:
        if layer == OUTSIDE:
            found: dict[Stage, np.ndarray] = {}
            for errors, factor in ((ref, 1.0 - share), (model, share)):
                for (at, stage), value in errors.values.items():
                    if at == OUTSIDE:
                        rows = length if stage is Stage.EMBEDDING else len(value)
                        part = np.pad(value, ((0, rows - len(value)), (0, 0))) * value.dtype.type(factor)
                        found[stage] = found.get(stage, 0) + part
            return found
        parts = [ref.layer(layer, length, 1.0 - share), model.layer(layer, length, share)]
        shapes = {stage: part[stage].shape for part in parts for stage in part}
        widths = shapes | {s: base_shape(base, s, length) for s in stages if s not in shapes}
        dtype = base.runner.arithmetic.dtype
        result = {stage: np.zeros(shape, dtype) for stage, shape in widths.items()}
        for part in parts:
            for stage, value in part.items():
                result[stage] += value
        return result

    return added


def base_shape(base: PatchedModel, stage: Stage, length: int) -> tuple[int, int]:
    """A stage's padded shape."""
    from aprjax.bisect.replay.layers import stage_widths

    return length, stage_widths(base.runner.checkpoint.config, length)[stage]
