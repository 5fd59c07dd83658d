"""A side's local errors against the base network, layer by layer, on disk where they are large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.patching import PatchedModel
from aprjax.bisect.replay.layers import padded
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.model import bucket, trim
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

# A score of a masked key: engines leave other things there, which no result depends on.
_MASKED = (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)


@dataclass
class Errors:
    """Local errors by (layer, stage), `[position, width]` without padding; layer -1 holds those outside the layers."""

    values: dict[tuple[int, Stage], np.ndarray] = field(default_factory=dict)

    def layer(self, index: int, length: int, scale: float = 1.0) -> dict[Stage, np.ndarray]:
        """A layer's errors, padded for a run, times a factor."""
        return {
            stage: padded(stage, np.asarray(value) * value.dtype.type(scale), length)
            for (at, stage), value in self.values.items()
            if at == index
        }

    def at(self, layer: int, stage: Stage) -> np.ndarray | None:
        """One error; None where the side has no such stage, or no error there."""
        return self.values.get((layer, stage))


@dataclass
class Source:
    """A side's own values: whole layers of a run that goes along, or a trace's."""

    side: Runner | Traced
    tokens: Sequence[int]
    rows: Sequence[int]
    weights: WeightSource
    _model: PatchedModel | None = None

    def layers(self) -> Iterator[tuple[int, np.ndarray, Mapping[Stage, np.ndarray]]]:
        """(layer, its input, its stages), padded, in order; then (num_layers, the last hidden state, {})."""
        if isinstance(self.side, Traced):
            yield from self._traced(self.side)
            return
        model = PatchedModel(self.side, self.tokens, self.rows, self.weights)
        self._model = model
        hidden = model.embedded
        for index in range(len(model.layers)):
            output, stages = model.layer(index, hidden)
            yield index, hidden, stages
            hidden = output
        yield len(model.layers), hidden, {}

    def head(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Final norm and logits at the chosen positions, after `layers` has come to its end."""
        if isinstance(self.side, Traced):
            trace = self.side.trace
            at = {position: row for row, position in enumerate(trace.info.head_positions)}
            missing = [row for row in self.rows if row not in at]
            if missing or (OUTSIDE, Stage.LM_HEAD) not in set(trace):
                where = f"at position {missing[0]}" if missing else "at all"
                raise CheckpointError(
                    f"the trace has no logits {where}", file=trace.info.path, fix="record the trace with its logits"
                )
            chosen = [at[row] for row in self.rows]
            logits = trace[OUTSIDE, Stage.LM_HEAD][chosen]
            normed = trace[OUTSIDE, Stage.FINAL_NORM][chosen] if (OUTSIDE, Stage.FINAL_NORM) in set(trace) else None
            return (normed if normed is not None else np.empty(0, np.float32)), logits
        assert self._model is not None
        normed = self._model.final_norm(hidden)
        return normed, self._model.logits(hidden, normed)

    def _traced(self, side: Traced) -> Iterator[tuple[int, np.ndarray, Mapping[Stage, np.ndarray]]]:
        trace, present = side.trace, set(side.trace)
        length = bucket(len(trace.info.tokens))
        last = 1 + max(layer for layer, _ in present)
        for index in range(last + 1):
            key = (index - 1, Stage.POST_FFN_RESIDUAL) if index else (OUTSIDE, Stage.EMBEDDING)
            if key not in present:
                raise CheckpointError(
                    f"the trace lacks {key[1]} of layer {key[0]}, the input of layer {index}",
                    file=trace.info.path,
                    fix="record the trace with all stages",
                )
            stages = {s: padded(s, trace[index, s], length) for s in LAYER_STAGES if (index, s) in present}
            yield index, padded(key[1], trace[key], length), stages


def base_runner(file: Runner | Traced, dtype: str) -> Runner:
    """The base network of a reference: its file, decoded, in float32 or float64.

    Raises:
        CheckpointError: the file that a trace was made from is not at hand.
    """
    if file.checkpoint is None:
        raise CheckpointError(
            "the file that the trace was made from is not at hand, so there is no network to take gradients of",
            file=file.trace.info.path if isinstance(file, Traced) else None,
            fix="put it back where the trace says that it was, or give the file as --ref",
        )
    return Runner(file.checkpoint, preset(dtype))


def local_errors(source: Source, base: PatchedModel, folder: Path) -> tuple[Errors, np.ndarray]:
    """The side's local errors against the base, and its logits at the chosen positions.

    Large ones lie in `folder`, memory-mapped.

    Raises:
        CheckpointError: a trace lacks a layer's output or the logits.
    """
    errors = Errors()
    count, dtype = len(base.tokens), base.runner.arithmetic.dtype
    visible = _visible(count)
    last = np.empty(0)
    for index, hidden, stages in source.layers():
        if index == 0:
            _keep(errors, folder, (OUTSIDE, Stage.EMBEDDING), hidden[:count].astype(dtype) - base.embedded[:count])
        if index == len(base.layers):
            last = hidden
            break
        given = {stage: np.asarray(value).astype(dtype) for stage, value in stages.items()}
        _, computed = base.layer(index, hidden.astype(dtype), given)
        for stage, value in given.items():
            difference = np.asarray(trim(stage, value, count)) - np.asarray(trim(stage, computed[stage], count))
            if stage in _MASKED:
                difference = np.where(np.tile(visible, (1, difference.shape[1] // count)), difference, 0)
            _keep(errors, folder, (index, stage), difference)
    normed, logits = source.head(last)
    computed_norm = base.final_norm(last.astype(dtype))
    if normed.size:
        _keep(errors, folder, (OUTSIDE, Stage.FINAL_NORM), normed.astype(dtype) - computed_norm)
        computed_norm = normed.astype(dtype)
    _keep(errors, folder, (OUTSIDE, Stage.LM_HEAD), logits.astype(dtype) - base.logits(last, computed_norm))
    return errors, logits


# Errors of this many elements and more are written to disk: 1 MiB of float32.
_ON_DISK = 1 << 18


def _keep(errors: Errors, folder: Path, key: tuple[int, Stage], value: np.ndarray) -> None:
    if not np.any(value):
        return
    if value.size < _ON_DISK:
        errors.values[key] = value
        return
    path = folder / f"{key[0]}-{key[1]}-{len(errors.values)}.npy"
    np.save(path, value)
    errors.values[key] = np.load(path, mmap_mode="r")


def _visible(count: int) -> np.ndarray:
    return np.tril(np.ones((count, count), bool))
