"""Runs of one model from another's values: what `locate` asks its questions with.

A *boundary* stands before a layer: boundary 0 is the embedding, boundary `num_layers` the last hidden state.
A run that starts at a boundary with another side's value there is the same as a whole run in which that value
was put in, and costs only the layers behind it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aprjax.bisect.lockstep import Runner, Values, WeightSource
from aprjax.bisect.replay.layers import padded, require_comparable
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import Checkpoint, UnmeasurableError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, require_runnable
from aprjax.qwen2.model import embed_padded, precision_scope, run_head, run_norm
from aprjax.qwen2.modules import DecoderLayer, PackedWeight, RMSNorm
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

Hidden = Float[np.ndarray, "padded hidden"]
Logits = Float[np.ndarray, "position vocab"]


@dataclass
class Spent:
    """What was run: how many runs, and how many layers they went through."""

    num_layers: int
    runs: int = 0
    layers: int = 0

    @property
    def passes(self) -> float:
        """Whole forward passes that the layers amount to."""
        return self.layers / self.num_layers if self.num_layers else 0.0


class PatchedModel:
    """A loaded side that can be run from any boundary, with values put in at any stage."""

    def __init__(
        self,
        runner: Runner,
        tokens: Sequence[int],
        rows: Sequence[int],
        weights: WeightSource,
        beside: tuple[Arithmetic, ...] = (),
    ) -> None:
        """Loads every layer; what `weights` has packed for another side already is shared with it.

        `beside` are the arithmetics of other sides, whose values are put in: where one depends on the batch, none pads.

        Raises:
            CheckpointError: the file lacks what a forward pass needs, or has no such tokens.
        """
        require_runnable(runner.checkpoint)
        self.runner, self.tokens, self.rows = runner, list(tokens), list(rows)
        checkpoint = runner.checkpoint
        self.layers: list[DecoderLayer] = [
            load_layer(checkpoint, index, weights) for index in range(checkpoint.config.num_layers)
        ]
        self.norm: RMSNorm = load_norm(checkpoint, "model.norm.weight")
        self.head: PackedWeight = weights(replace(head_tensor(checkpoint), name="lm_head.weight"))
        self.beside = (runner.arithmetic, *beside)
        self.embedded = embed_padded(checkpoint, self.tokens, *self.beside)
        self.context = runner.context(len(self.embedded))
        self.spent = Spent(len(self.layers))
        self.boundaries: list[Hidden] = []

    def run(self) -> Logits:
        """The whole free run; it keeps the value at every boundary."""
        self.spent.runs += 1
        self.boundaries = [self.embedded]
        for index in range(len(self.layers)):
            output, _ = self.layer(index, self.boundaries[-1])
            self.boundaries.append(output)
        return self.logits(self.boundaries[-1])

    def layer(
        self, index: int, hidden: Hidden, replacements: Mapping[Stage, np.ndarray] | None = None
    ) -> tuple[Hidden, Values]:
        """One layer's output, and its stages as computed before anything was put in; padded positions included."""
        self.spent.layers += 1
        return self.runner.run(self.layers[index], hidden, self.context, dict(replacements or {}))

    def resume(self, hidden: Hidden, boundary: int, stop: int | None = None) -> Hidden:
        """The value at boundary `stop` (by default the last) of a run that has `hidden` at `boundary`."""
        for index in range(boundary, len(self.layers) if stop is None else stop):
            hidden, _ = self.layer(index, hidden)
        return hidden

    def logits(self, hidden: Hidden, normed: np.ndarray | None = None) -> Logits:
        """Logits at the chosen positions, from the last hidden state, or from the final norm's output there."""
        arithmetic = self.runner.arithmetic
        with precision_scope(arithmetic):
            fed = jnp.asarray(self.final_norm(hidden) if normed is None else normed)
            return np.asarray(run_head(self.head, fed, arithmetic=arithmetic))

    def final_norm(self, hidden: Hidden) -> np.ndarray:
        """The final norm at the chosen positions."""
        arithmetic = self.runner.arithmetic
        with precision_scope(arithmetic):
            return np.asarray(run_norm(self.norm, jnp.asarray(hidden[self.rows]), arithmetic=arithmetic))

    def under(self, arithmetic: Arithmetic) -> PatchedModel:
        """The same weights, computed with by another arithmetic; what is spent counts here."""
        other = copy.copy(self)
        other.runner = replace(self.runner, arithmetic=arithmetic)
        other.context = other.runner.context(len(self.embedded))
        other.boundaries = []
        return other

    def exchanging(self, name: str, other: Checkpoint, weights: WeightSource) -> PatchedModel:
        """The model with one tensor of another file; what is spent counts here. A tied head stays as it is.

        Raises:
            CheckpointError: the other file lacks the tensor, or has it in another shape.
        """
        theirs, mine = other.tensors.get(name), self.runner.checkpoint.tensors
        tensors = {key: tensor for key, tensor in mine.items() if key != name}
        if theirs is not None:
            tensors[name] = theirs
        elif name == "lm_head.weight":
            tensors[name] = replace(head_tensor(other), name=name)
        changed = copy.copy(self)
        changed.runner = replace(self.runner, checkpoint=replace(self.runner.checkpoint, tensors=tensors))
        require_runnable(changed.runner.checkpoint)
        changed.boundaries = []
        inside = re.match(r"model\.layers\.(\d+)\.", name)
        if inside is not None:
            changed.layers = list(self.layers)
            changed.layers[int(inside[1])] = load_layer(changed.runner.checkpoint, int(inside[1]), weights)
        elif name == "model.embed_tokens.weight":
            changed.embedded = embed_padded(changed.runner.checkpoint, self.tokens, *self.beside)
        elif name == "model.norm.weight":
            changed.norm = load_norm(changed.runner.checkpoint, name)
        else:
            changed.head = weights(replace(head_tensor(changed.runner.checkpoint), name="lm_head.weight"))
        return changed

    def counted(self, run: Callable[[], Any]) -> Any:
        """Whatever `run` gives, counted as one run."""
        self.spent.runs += 1
        return run()


@dataclass
class RunReference:
    """A reference that runs here: every value can be computed, and another side's values can be put into it."""

    model: PatchedModel
    logits: Logits = field(init=False)

    def __post_init__(self) -> None:
        self.logits = self.model.run()

    def boundary(self, index: int) -> Hidden:
        """Its value before layer `index`."""
        return self.model.boundaries[index]

    def stages(self, layer: int) -> Values:
        """Its values inside a layer, padded positions included."""
        return self.model.layer(layer, self.boundary(layer))[1]

    def final_norm(self) -> np.ndarray:
        """Its final norm at the chosen positions."""
        return self.model.final_norm(self.model.boundaries[-1])


@dataclass
class TraceReference:
    """A reference that ran elsewhere: its values can be put into the model, but not the other way round."""

    traced: Traced
    rows: list[int]
    embedded: Hidden
    logits: Logits = field(init=False)
    model: PatchedModel | None = None

    def __post_init__(self) -> None:
        self.logits = self._at_the_head(Stage.LM_HEAD)

    @property
    def _length(self) -> int:
        return len(self.embedded)

    def boundary(self, index: int) -> Hidden:
        """Its value before layer `index`; without a recorded embedding, the model's own.

        Raises:
            UnmeasurableError: the trace lacks that layer's output.
        """
        key = (index - 1, Stage.POST_FFN_RESIDUAL) if index else (OUTSIDE, Stage.EMBEDDING)
        if key not in set(self.traced.trace):
            if index == 0:
                return self.embedded
            raise UnmeasurableError(
                f"the trace lacks {key[1]} of layer {key[0]}, the value to put in there",
                file=self.traced.trace.info.path,
                fix="record the trace with the outputs of all layers",
            )
        return padded(key[1], self.traced.trace[key], self._length)

    def stages(self, layer: int) -> Values:
        """Its values inside a layer, as far as it has them."""
        trace = self.traced.trace
        present = [stage for stage in LAYER_STAGES if (layer, stage) in set(trace)]
        return {stage: padded(stage, trace[layer, stage], self._length) for stage in present}

    def final_norm(self) -> np.ndarray | None:
        """Its final norm at the chosen positions; None where the trace lacks it."""
        if (OUTSIDE, Stage.FINAL_NORM) not in set(self.traced.trace):
            return None
        return self._at_the_head(Stage.FINAL_NORM)

    def _at_the_head(self, stage: Stage) -> np.ndarray:
        trace = self.traced.trace
        at = {position: row for row, position in enumerate(trace.info.head_positions)}
        missing = [row for row in self.rows if row not in at]
        if missing or (OUTSIDE, stage) not in set(trace):
            what = f"at position {missing[0]}" if missing else "at all"
            raise UnmeasurableError(
                f"the trace has no {stage} {what}", file=trace.info.path, fix="record the trace with its logits"
            )
        return trace[OUTSIDE, stage][[at[row] for row in self.rows]]


Reference = RunReference | TraceReference


def open_reference(
    side: Runner | Traced, model: PatchedModel, weights: WeightSource, tokens: Sequence[int]
) -> Reference:
    """The reference as a source of values.

    Raises:
        UnmeasurableError: the trace is of other tokens, shapes or positions, or the file cannot be run.
    """
    if isinstance(side, Runner):
        return RunReference(PatchedModel(side, tokens, model.rows, weights, model.beside))
    require_traced(side, tokens, model.runner.checkpoint)
    _require_finite(side)
    return TraceReference(side, model.rows, model.embedded)


def require_traced(side: Traced, tokens: Sequence[int], checkpoint: Checkpoint) -> None:
    """Checks that a trace is of these tokens and of a model like this one.

    Raises:
        UnmeasurableError: it is of other tokens.
        CheckpointError: it has other shapes, or lacks positions.
    """
    if side.trace.info.tokens != tuple(tokens):
        raise UnmeasurableError(
            f"the trace is of {len(side.trace.info.tokens)} tokens, not of the {len(tokens)} asked for",
            file=side.trace.info.path,
            fix="leave the prompt out to take the trace's own tokens",
        )
    require_comparable(side.trace, checkpoint)


def _require_finite(side: Traced) -> None:
    """Refuses NaN and infinity by its first place in execution order: putting it in would heal nothing."""
    order = {stage: index for index, stage in enumerate(Stage)}
    last = 1 + max((layer for layer, _ in side.trace), default=0)
    # The embedding comes before the layers, the head behind them.
    places = sorted(
        side.trace,
        key=lambda key: (last if key[0] == OUTSIDE and key[1] is not Stage.EMBEDDING else key[0], order[key[1]]),
    )
    for layer, stage in places:
        value = side.trace[layer, stage]
        if stage is Stage.ATTN_SCORES or np.isfinite(value).all():
            continue  # masked scores may be minus infinity
        row, channel = (int(i) for i in np.argwhere(~np.isfinite(value))[0])
        where = str(stage) if layer == OUTSIDE else f"{stage} of layer {layer}"
        raise UnmeasurableError(
            f"the trace's value is {value[row, channel]} in {where}, row {row}, channel {channel}: nothing to judge by",
            file=side.trace.info.path,
            fix="`python -m aprjax replay` says which node made it",
        )
