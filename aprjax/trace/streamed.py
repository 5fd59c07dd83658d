"""A checkpoint's run as a stream of values: in memory are one layer's values, its weights and those of the next."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, require_runnable
from aprjax.qwen2.model import (
    bucket,
    causal_context,
    embed_padded,
    precision_scope,
    run_head,
    run_layer,
    run_norm,
    trim,
)
from aprjax.qwen2.modules import DecoderLayer
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.qwen2.streaming import head_batches, pack_and_release
from aprjax.trace.behind import Behind
from aprjax.trace.capture import EVERYTHING, HEAD_STAGES, Capture, chosen_positions
from aprjax.trace.engine import check_tokens
from aprjax.trace.memory import MemoryTrace
from aprjax.trace.trace import Trace, TraceInfo, TraceWriter, this_platform

# Of values that wait to be written while the next layer runs: about a layer's of 256 tokens of the 7B. Where a layer's
# are more than this, the run waits for the disk, and no more than this is held beside a layer.
_WRITTEN_BEHIND = 1 << 27


@dataclass(frozen=True)
class Piece:
    """One value, or of the head's some rows of one.

    Attributes:
        layer, stage: which value.
        values: `float32[rows, width]`.
        total_rows: that the value has in all.
    """

    layer: int
    stage: Stage
    values: np.ndarray
    total_rows: int


@dataclass(frozen=True)
class StreamedRun:
    """A run that is asked for and has not begun.

    Attributes:
        checkpoint: the file.
        tokens: what it is fed.
        arithmetic: how it computes.
        capture: what is kept.
    """

    checkpoint: Checkpoint
    tokens: list[int]
    arithmetic: Arithmetic
    capture: Capture = EVERYTHING

    def __post_init__(self) -> None:
        """Checks file, tokens and positions.

        Raises:
            CheckpointError: the file lacks what a forward pass needs, or something is asked for that it has not.
        """
        require_runnable(self.checkpoint)
        check_tokens(self.checkpoint, self.tokens)
        chosen_positions(self.capture.positions, len(self.tokens))
        self.capture.last_layer(self.checkpoint.config.num_layers)

    def info(self) -> TraceInfo:
        """What the trace of this run says of itself."""
        chosen = chosen_positions(self.capture.positions, len(self.tokens))
        return TraceInfo(
            path=str(self.checkpoint.path),
            sha256=self.checkpoint.sha256(),
            format=self.checkpoint.format,
            arithmetic=self.arithmetic.name,
            tokens=tuple(self.tokens),
            positions=chosen,
            head_positions=chosen,
            platform=this_platform(),
        )

    def pieces(self) -> Iterator[Piece]:
        """Runs, and yields what is kept in execution order. Layers behind the last one that is kept are not run."""
        arithmetic, count = self.arithmetic, len(self.tokens)
        rows = list(chosen_positions(self.capture.positions, count))
        last = self.capture.last_layer(self.checkpoint.config.num_layers)

        def piece(layer: int, stage: Stage, values: object) -> Iterator[Piece]:
            if self.capture.wants(layer, stage):
                # On a CPU this is a view, which is cut without copying.
                kept = trim(stage, np.asarray(values), count).astype(np.float32, copy=False)
                yield Piece(layer, stage, kept if len(rows) == count else kept[rows], len(rows))

        with precision_scope(arithmetic):
            hidden = jnp.asarray(embed_padded(self.checkpoint, self.tokens, arithmetic)).astype(arithmetic.dtype)
            context = causal_context(self.checkpoint.config, arithmetic, length=hidden.shape[0])
        yield from piece(OUTSIDE, Stage.EMBEDDING, hidden)
        for index, layer in self._layers(min(last + 1, self.checkpoint.config.num_layers)):
            # The generator may rest between two pieces, so the scope is left before each.
            with precision_scope(arithmetic):
                hidden, _, captured = run_layer(layer, hidden, context, {}, {}, arithmetic=arithmetic, capture=True)
                del layer
            for stage in LAYER_STAGES:
                yield from piece(index, stage, captured.pop(stage))
        if last == self.checkpoint.config.num_layers:
            yield from self._head(np.asarray(hidden)[:count], rows)

    def _layers(self, count: int) -> Iterator[tuple[int, DecoderLayer]]:
        """The first layers, each packed while the one before it is computed and its values are written."""

        def load(index: int) -> DecoderLayer:
            # A scope is its thread's own.
            with precision_scope(self.arithmetic):
                return load_layer(self.checkpoint, index, pack_and_release)

        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming = [ahead.submit(load, 0)] if count else []
            for index in range(count):
                layer = coming.pop().result()
                coming += [ahead.submit(load, index + 1)] if index + 1 < count else []
                yield index, layer
                del layer

    def _head(self, hidden: np.ndarray, rows: list[int]) -> Iterator[Piece]:
        arithmetic = self.arithmetic
        norm = load_norm(self.checkpoint, "model.norm.weight")
        head = pack_and_release(head_tensor(self.checkpoint)) if self.capture.wants(OUTSIDE, Stage.LM_HEAD) else None
        # Where a row's bits hang on its place in the batch, all rows are computed, as without a choice.
        computed = list(range(len(hidden))) if arithmetic.depends_on_batch else rows
        for batch in head_batches(len(computed)):
            chosen = computed[batch]
            kept = [index for index, position in enumerate(chosen) if position in set(rows)]
            if not kept:
                continue
            with precision_scope(arithmetic):
                normed = run_norm(norm, jnp.asarray(hidden[chosen]), arithmetic=arithmetic)
                logits = None if head is None else run_head(head, normed, arithmetic=arithmetic)
                found = [np.asarray(value, np.float32) for value in (normed, logits) if value is not None]
            for stage, values in zip(HEAD_STAGES, found, strict=False):
                if self.capture.wants(OUTSIDE, stage):
                    yield Piece(OUTSIDE, stage, values[kept], len(rows))

    def save(self, target: Path) -> Trace:
        """Runs into a file, which appears when it is complete."""
        layers = self.checkpoint.config.num_layers
        with ExitStack() as stack, Behind(_WRITTEN_BEHIND) as behind:
            opened: list[TraceWriter] = []

            def begin() -> None:
                # The file's digest is made while the first layer is read and compiled.
                opened.append(stack.enter_context(TraceWriter(target, self.info(), layers=layers)))

            def write(piece: Piece) -> None:
                opened[0].write(piece.layer, piece.stage, piece.values, total_rows=piece.total_rows)

            behind(begin)
            for piece in self.pieces():
                behind(partial(write, piece), piece.values.nbytes)
        return Trace.load(target)

    def collect(self) -> MemoryTrace:
        """Runs, and holds what is kept in memory."""
        parts: dict[tuple[int, Stage], list[np.ndarray]] = {}
        # A view of padded values would keep the padding, too.
        padded = bucket(len(self.tokens), self.arithmetic) != len(self.tokens)
        with ThreadPoolExecutor(max_workers=1) as beside:
            info = beside.submit(self.info)
            for piece in self.pieces():
                values = piece.values.copy() if padded else piece.values
                parts.setdefault((piece.layer, piece.stage), []).append(values)
        values = {key: found[0] if len(found) == 1 else np.concatenate(found) for key, found in parts.items()}
        return MemoryTrace(info.result(), values)
