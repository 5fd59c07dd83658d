"""A side's local errors against the base network, layer by layer, on disk where they are large."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.files import FilesReport
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.patching import PatchedModel
from aprjax.bisect.reads import differs_at
from aprjax.bisect.replay.layers import padded
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import UnmeasurableError
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm
from aprjax.qwen2.model import bucket, embed_padded, precision_scope, run_head, run_norm, trim
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

# A score of a masked key: engines leave other things there, which no result depends on.
_MASKED = (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)


@dataclass
class Errors:
    """Local errors by (layer, stage), `[position, width]` without padding; layer -1 holds those outside the layers.

    Attributes:
        values: of all stages that have any.
        from_file: the part of them that the side's *file* makes, computed in the base's arithmetic from the same
            inputs: `x (W_side - W_base)^T` for a matrix. Of the stages that read what the two files differ in.
    """

    values: dict[tuple[int, Stage], np.ndarray] = field(default_factory=dict)
    from_file: dict[tuple[int, Stage], np.ndarray] = field(default_factory=dict)

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
    """A side's own values: whole layers of a run that goes along, or a trace's.

    Attributes:
        side: it.
        tokens, rows: what it is fed, and where its logits are looked at.
        weights: what is packed already.
        beside: the arithmetics of all sides: where one depends on the batch, nobody pads.
        model: a side that runs here, once it has run.
    """

    side: Runner | Traced
    tokens: Sequence[int]
    rows: Sequence[int]
    weights: WeightSource
    beside: tuple[Arithmetic, ...] = ()
    model: PatchedModel | None = None

    def layers(self) -> Iterator[tuple[int, np.ndarray, Mapping[Stage, np.ndarray]]]:
        """(layer, its input, its stages), padded, in order; then (num_layers, the last hidden state, {})."""
        if isinstance(self.side, Traced):
            yield from self._traced(self.side)
            return
        model = PatchedModel(self.side, self.tokens, self.rows, self.weights, self.beside)
        self.model = model
        hidden = model.embedded
        model.boundaries = [hidden]
        for index in range(len(model.layers)):
            output, stages = model.layer(index, hidden)
            yield index, hidden, stages
            hidden = output
            model.boundaries.append(hidden)
        yield len(model.layers), hidden, {}

    def value(self, layer: int, stage: Stage) -> np.ndarray | None:
        """One stage's value without padding, after `layers` has come to its end; None where a trace lacks it."""
        if isinstance(self.side, Traced):
            return self.side.trace[layer, stage] if (layer, stage) in set(self.side.trace) else None
        assert self.model is not None
        computed = self.model.layer(layer, self.model.boundaries[layer])[1]
        return np.asarray(trim(stage, computed[stage], len(self.tokens)))

    def head(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Final norm and logits at the chosen positions, after `layers` has come to its end."""
        if isinstance(self.side, Traced):
            trace = self.side.trace
            at = {position: row for row, position in enumerate(trace.info.head_positions)}
            missing = [row for row in self.rows if row not in at]
            if missing or (OUTSIDE, Stage.LM_HEAD) not in set(trace):
                where = f"at position {missing[0]}" if missing else "at all"
                raise UnmeasurableError(
                    f"the trace has no logits {where}", file=trace.info.path, fix="record the trace with its logits"
                )
            chosen = [at[row] for row in self.rows]
            logits = trace[OUTSIDE, Stage.LM_HEAD][chosen]
            normed = trace[OUTSIDE, Stage.FINAL_NORM][chosen] if (OUTSIDE, Stage.FINAL_NORM) in set(trace) else None
            return (normed if normed is not None else np.empty(0, np.float32)), logits
        assert self.model is not None
        normed = self.model.final_norm(hidden)
        return normed, self.model.logits(hidden, normed)

    def _traced(self, side: Traced) -> Iterator[tuple[int, np.ndarray, Mapping[Stage, np.ndarray]]]:
        trace, present = side.trace, set(side.trace)
        length = bucket(len(trace.info.tokens), *self.beside)
        last = 1 + max(layer for layer, _ in present)
        for index in range(last + 1):
            key = (index - 1, Stage.POST_FFN_RESIDUAL) if index else (OUTSIDE, Stage.EMBEDDING)
            if key not in present:
                raise UnmeasurableError(
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
        raise UnmeasurableError(
            "the file that the trace was made from is not at hand, so there is no network to take gradients of",
            file=file.trace.info.path if isinstance(file, Traced) else None,
            fix="put it back where the trace says that it was, or give the file as --ref",
        )
    return Runner(file.checkpoint, preset(dtype))


def local_errors(
    source: Source, base: PatchedModel, folder: Path, files: FilesReport | None = None
) -> tuple[Errors, np.ndarray]:
    """The side's local errors against the base, and its logits at the chosen positions.

    Large ones lie in `folder`, memory-mapped. With `files`, the comparison of the side's file with the base's, the part
    that the file makes is told apart.

    Raises:
        UnmeasurableError: a trace lacks a layer's output or the logits, or a value is not finite.
    """
    errors, own = Errors(), _OwnFile.of(source, base, files)
    count, dtype = len(base.tokens), base.runner.arithmetic.dtype
    visible = _visible(count)
    last = np.empty(0)

    def keep(key: tuple[int, Stage], error: np.ndarray, from_file: np.ndarray | None) -> None:
        _keep(errors.values, folder, key, error)
        if from_file is not None:
            _keep(errors.from_file, folder, key, from_file)

    for index, hidden, stages in source.layers():
        if index == 0:
            embedded = None if own is None else own.embedded(base)
            keep((OUTSIDE, Stage.EMBEDDING), hidden[:count].astype(dtype) - base.embedded[:count], embedded)
        if index == len(base.layers):
            last = hidden
            break
        fed = hidden.astype(dtype)
        given = {stage: np.asarray(value).astype(dtype) for stage, value in stages.items()}
        _, computed = base.layer(index, fed, given)
        by_file = {} if own is None else own.layer(index, fed, given)
        for stage, value in given.items():
            _require_finite(source, (index, stage), np.asarray(trim(stage, value, count)), range(count))
            parts = [value, by_file.get(stage)]
            differences = [None if part is None else _difference(stage, part, computed[stage], count) for part in parts]
            if stage in _MASKED:
                seen = np.tile(visible, (1, computed[stage].shape[1] // len(computed[stage])))
                differences = [None if part is None else np.where(seen, part, 0) for part in differences]
            assert differences[0] is not None
            keep((index, stage), differences[0], differences[1])
    normed, logits = source.head(last)
    _require_finite(source, (OUTSIDE, Stage.LM_HEAD), logits, source.rows)
    computed_norm = base.final_norm(last.astype(dtype))
    by_norm = None if own is None else own.final_norm(last.astype(dtype), base)
    if normed.size:
        part = None if by_norm is None else by_norm - computed_norm
        keep((OUTSIDE, Stage.FINAL_NORM), normed.astype(dtype) - computed_norm, part)
        computed_norm = normed.astype(dtype)
    computed_logits = base.logits(last, computed_norm)
    by_head = None if own is None else own.logits(computed_norm, base)
    part = None if by_head is None else by_head - computed_logits
    keep((OUTSIDE, Stage.LM_HEAD), logits.astype(dtype) - computed_logits, part)
    return errors, logits


def _require_finite(source: Source, key: tuple[int, Stage], value: np.ndarray, positions: Sequence[int]) -> None:
    """Refuses NaN and infinity by the first place: nothing can be shared out. Masked scores may be anything."""
    bad = ~np.isfinite(value)
    if key[1] is Stage.ATTN_SCORES or not bad.any():
        return
    row, channel = (int(i) for i in np.argwhere(bad)[0])
    side = source.side
    path = side.trace.info.path if isinstance(side, Traced) else side.checkpoint.path
    where = str(key[1]) if key[0] == OUTSIDE else f"{key[1]} of layer {key[0]}"
    raise UnmeasurableError(
        f"the value is {value[row, channel]} in {where}, position {positions[row]}, channel {channel}",
        file=path,
        fix="`python -m aprjax layers` or `locate` names what makes it",
    )


def _difference(stage: Stage, value: np.ndarray, computed: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(trim(stage, value, count)) - np.asarray(trim(stage, computed, count))


@dataclass
class _OwnFile:
    """A side's file in the base's arithmetic: what it gives where it differs from the base's file."""

    runner: Runner
    files: FilesReport
    weights: WeightSource
    rows: Sequence[int]

    @classmethod
    def of(cls, source: Source, base: PatchedModel, files: FilesReport | None) -> _OwnFile | None:
        """None where the file is not at hand, or differs in nothing."""
        checkpoint = source.side.checkpoint
        if checkpoint is None or files is None or not (files.active_config or files.differing):
            return None
        return cls(Runner(checkpoint, base.runner.arithmetic), files, source.weights, base.rows)

    def embedded(self, base: PatchedModel) -> np.ndarray | None:
        """The embedding rows' difference."""
        if not differs_at(OUTSIDE, Stage.EMBEDDING, self.files):
            return None
        count = len(base.tokens)
        own = embed_padded(self.runner.checkpoint, base.tokens)[:count]
        return (own - base.embedded[:count]).astype(base.runner.arithmetic.dtype)

    def layer(self, index: int, hidden: np.ndarray, given: Mapping[Stage, np.ndarray]) -> dict[Stage, np.ndarray]:
        """The stages that read what differs, computed by this file from the given inputs."""
        stages = [stage for stage in given if differs_at(index, stage, self.files)]
        if not stages:
            return {}
        layer = load_layer(self.runner.checkpoint, index, self.weights)
        _, computed = self.runner.run(layer, hidden, self.runner.context(len(hidden)), dict(given))
        return {stage: computed[stage] for stage in stages}

    def final_norm(self, last: np.ndarray, base: PatchedModel) -> np.ndarray | None:
        """The final norm by this file."""
        if not differs_at(OUTSIDE, Stage.FINAL_NORM, self.files):
            return None
        norm, arithmetic = load_norm(self.runner.checkpoint, "model.norm.weight"), self.runner.arithmetic
        with precision_scope(arithmetic):
            return np.asarray(run_norm(norm, jnp.asarray(last[self.rows]), arithmetic=arithmetic))

    def logits(self, normed: np.ndarray, base: PatchedModel) -> np.ndarray | None:
        """The logits by this file, from a final norm's values."""
        if not differs_at(OUTSIDE, Stage.LM_HEAD, self.files):
            return None
        head = self.weights(replace(head_tensor(self.runner.checkpoint), name="lm_head.weight"))
        with precision_scope(self.runner.arithmetic):
            return np.asarray(run_head(head, jnp.asarray(normed), arithmetic=self.runner.arithmetic))


# Errors of this many elements and more are written to disk: 1 MiB of float32.
_ON_DISK = 1 << 18


def _keep(kept: dict[tuple[int, Stage], np.ndarray], folder: Path, key: tuple[int, Stage], value: np.ndarray) -> None:
    if not np.any(value):
        return
    if value.size < _ON_DISK:
        kept[key] = value
        return
    path = folder / f"{secrets.token_hex(8)}.npy"
    np.save(path, value)
    kept[key] = np.load(path, mmap_mode="r")
    # A mapped file needs no name: its gigabytes are gone with the process, however that ends. Windows keeps the name.
    with contextlib.suppress(OSError):
        path.unlink()


def _visible(count: int) -> np.ndarray:
    return np.tril(np.ones((count, count), bool))
