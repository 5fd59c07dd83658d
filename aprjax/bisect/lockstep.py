"""Two models run side by side, layer by layer, so that no more than one layer of either is in memory.

For every layer there are up to three runs: the reference; the model; and the model again with every
stage's value replaced by the reference's as it passes, so that each captured value is what the model
computes *from the reference's inputs*: the local difference, free of inheritance.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm
from aprjax.qwen2.model import causal_context, embed_padded, precision_scope, run_head, run_layer, run_norm, trim
from aprjax.qwen2.modules import Context, DecoderLayer, PackedWeight
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.qwen2.streaming import head_batches, pack_and_release

Values = dict[Stage, np.ndarray]


@dataclass(frozen=True)
class Runner:
    """One side: a file and the arithmetic that runs it."""

    checkpoint: Checkpoint
    arithmetic: Arithmetic

    def context(self, length: int) -> Context:
        """Rotation tables and mask for positions 0 … length - 1."""
        return causal_context(self.checkpoint.config, self.arithmetic, length=length)

    def run(
        self, layer: DecoderLayer, hidden: Any, context: Context, replacements: dict[Stage, Any] | None = None
    ) -> tuple[np.ndarray, dict[Stage, Any]]:
        """One layer's output and captured stages, padded positions included."""
        with precision_scope(self.arithmetic):
            given = {stage: jnp.asarray(v).astype(self.arithmetic.dtype) for stage, v in (replacements or {}).items()}
            output, _, captured = run_layer(
                layer, jnp.asarray(hidden), context, given, {}, arithmetic=self.arithmetic, capture=True
            )
            # jit returns a dict sorted by key; reports go in execution order.
            return np.asarray(output), {stage: np.asarray(captured[stage]) for stage in LAYER_STAGES}


def arbiter(arithmetic: Arithmetic) -> Arithmetic:
    """The same computation with float64 sums: integer dots become products of the same real numbers."""
    matmul = "integer-as-float" if arithmetic.matmul == "integer" else arithmetic.matmul
    return replace(arithmetic, name=f"{arithmetic.name} in float64", matmul=matmul, dtype="float64")


@dataclass(frozen=True)
class LayerPair:
    """One layer of both sides.

    Attributes:
        layer: its number; -1 for the stages outside the layers.
        model: the model's free-running values, at the real tokens.
        ref: the reference's.
        local: the model's values computed from the reference's inputs.
        local_ref_file: the reference's *file* under the model's arithmetic, from the reference's inputs;
            None when both sides use one arithmetic.
        rounding: call it for the reference's own values from its own inputs with float64 sums: what
            rounding alone does at each stage.
        against: what `local` is to be compared with, if not with `ref`: a trace cannot be run from the
            reference's inputs, so the reference's file is run from the trace's.
        rounded: what `rounding` is to be compared with, if not with `ref`.
        beyond: stages that come after the last value of a trace: nothing was run there.
    """

    layer: int
    model: Values
    ref: Values
    local: Values
    local_ref_file: Values | None
    rounding: Any
    against: Values | None = None
    rounded: Values | None = None
    beyond: tuple[Stage, ...] = ()


class WeightSource:
    """Packs matrices, once for all who ask: a file's own once, and both files' once where they hold the same bytes.

    What nobody holds any more is let go, so that a source adds nothing to what its callers keep.
    """

    def __init__(self, same_bytes: Callable[[str], bool]) -> None:
        """`same_bytes(name)` says whether both files hold the same bytes of a tensor."""
        self._same_bytes = same_bytes
        self._packed: dict[tuple[str, int], tuple[weakref.ref[PackedWeight], np.ndarray]] = {}

    def __call__(self, tensor: EncodedTensor) -> PackedWeight:
        """The matrix, laid out for computing."""
        # The bytes are kept beside the matrix: another array could otherwise come to lie at their address.
        key = (tensor.name, 0 if self._same_bytes(tensor.name) else id(tensor.data))
        held = self._packed.get(key)
        packed = None if held is None else held[0]()
        if packed is None:
            packed = pack_and_release(tensor)
            self._packed[key] = weakref.ref(packed), tensor.data
        return packed

    def clear(self) -> None:
        """Forgets what was packed."""
        self._packed.clear()


def run_layers(
    model: Runner, ref: Runner, tokens: list[int], weights: WeightSource
) -> Iterator[LayerPair | tuple[np.ndarray, np.ndarray]]:
    """Yields the embedding, then every layer, then (as a tuple) both sides' last hidden states."""
    count = len(tokens)
    run_by = (model.arithmetic, ref.arithmetic)
    hidden_model, hidden_ref = (embed_padded(side.checkpoint, tokens, *run_by) for side in (model, ref))
    yield _outside(Stage.EMBEDDING, hidden_model[:count], hidden_ref[:count])
    context_model, context_ref = model.context(len(hidden_ref)), ref.context(len(hidden_ref))
    mixed = replace(ref, arithmetic=model.arithmetic) if model.arithmetic != ref.arithmetic else None
    context_mixed = mixed.context(len(hidden_ref)) if mixed else None
    judge = replace(ref, arithmetic=arbiter(ref.arithmetic))

    for index in range(ref.checkpoint.config.num_layers):
        weights.clear()
        ref_layer = load_layer(ref.checkpoint, index, weights)
        model_layer = load_layer(model.checkpoint, index, weights)
        output_ref, values_ref = ref.run(ref_layer, hidden_ref, context_ref)
        output_model, values_model = model.run(model_layer, hidden_model, context_model)
        same_input = hidden_model.dtype == hidden_ref.dtype and np.array_equal(hidden_model, hidden_ref)
        if same_input and all(np.array_equal(values_model[s], values_ref[s]) for s in values_ref):
            # Nothing is inherited and nothing differs: the free-running values are the local ones.
            values_local = values_model
        else:
            _, values_local = model.run(model_layer, hidden_ref, context_model, values_ref)
        values_mixed = None
        if mixed is not None and context_mixed is not None:
            _, values_mixed = mixed.run(ref_layer, hidden_ref, context_mixed, values_ref)

        def rounding(layer: DecoderLayer = ref_layer, hidden: Any = hidden_ref, values: Any = values_ref) -> Values:
            return _trimmed(judge.run(layer, hidden, judge.context(len(hidden)), values)[1], count)

        yield LayerPair(
            index,
            _trimmed(values_model, count),
            _trimmed(values_ref, count),
            _trimmed(values_local, count),
            None if values_mixed is None else _trimmed(values_mixed, count),
            rounding,
        )
        hidden_model, hidden_ref = output_model, output_ref
    yield hidden_model[:count], hidden_ref[:count]


def run_final(
    model: Runner, ref: Runner, hidden: tuple[np.ndarray, np.ndarray], rows: list[int], weights: WeightSource
) -> Iterator[tuple[list[int], LayerPair]]:
    """The final norm and the head at the compared positions, `LOGIT_ROWS` at a time: (rows, both sides)."""
    mixed = replace(ref, arithmetic=model.arithmetic) if model.arithmetic != ref.arithmetic else None
    judge = replace(ref, arithmetic=arbiter(ref.arithmetic))
    hidden_model, hidden_ref = hidden
    weights.clear()
    heads = {
        id(side.checkpoint): (
            load_norm(side.checkpoint, "model.norm.weight"),
            weights(replace(head_tensor(side.checkpoint), name="lm_head.weight")),
        )
        for side in (model, ref)
    }

    def run(side: Runner, hidden: np.ndarray, normed: np.ndarray | None = None) -> Values:
        norm, head = heads[id(side.checkpoint)]
        with precision_scope(side.arithmetic):
            computed = run_norm(norm, jnp.asarray(hidden), arithmetic=side.arithmetic)
            fed = computed if normed is None else jnp.asarray(normed)
            logits = run_head(head, fed, arithmetic=side.arithmetic)
            return {Stage.FINAL_NORM: np.asarray(computed), Stage.LM_HEAD: np.asarray(logits)}

    for batch in head_batches(len(rows)):
        chosen = rows[batch]
        mine, theirs = hidden_model[chosen], hidden_ref[chosen]
        values_ref, values_model = run(ref, theirs), run(model, mine)
        normed = values_ref[Stage.FINAL_NORM]
        same = np.array_equal(mine, theirs) and all(np.array_equal(values_model[s], values_ref[s]) for s in values_ref)
        values_local = values_model if same else run(model, theirs, normed)

        def rounding(theirs: np.ndarray = theirs, normed: np.ndarray = normed) -> Values:
            return run(judge, theirs, normed)

        values_mixed = run(mixed, theirs, normed) if mixed else None
        yield chosen, LayerPair(OUTSIDE, values_model, values_ref, values_local, values_mixed, rounding)


def _trimmed(values: dict[Stage, np.ndarray], count: int) -> Values:
    return {stage: trim(stage, value, count) for stage, value in values.items()}


def _outside(stage: Stage, model: np.ndarray, ref: np.ndarray) -> LayerPair:
    return LayerPair(OUTSIDE, {stage: model}, {stage: ref}, {stage: model}, None, lambda: {stage: ref})
