"""Both sides' logits on the same tokens, a few positions at a time: models streamed layer by layer, and traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.files import FilesReport
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.traced import Side, Traced
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, require_runnable
from aprjax.qwen2.model import embed_padded, precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context, DecoderLayer
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.qwen2.streaming import LOGIT_ROWS
from aprjax.trace.engine import check_tokens

Progress = Callable[[str, int, int], None]
# What a layer's computation reads of the config beside the tensors.
_READ = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_pairing", "rms_norm_eps")
_HEAD = "lm_head.weight"
_NORM = "model.norm.weight"


@dataclass
class Shared:
    """How much of the model's work was the reference's to the bit, and so was not done again.

    Attributes:
        layers: computed once for both sides.
        of: in all.
    """

    layers: int = 0
    of: int = 0


def paired_logits(
    model: Side,
    ref: Side,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    files: FilesReport | None = None,
    shared: Shared | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (positions, the model's logits there, the reference's), at most `LOGIT_ROWS` positions at a time.

    Args:
        model: the side under suspicion.
        ref: the side it is judged by.
        tokens: what both are fed.
        positions: the compared ones, ascending.
        files: the files comparison: what both files hold in the same bytes is loaded once, and computed once
            where the inputs are the same bits, too.
        shared: told how much was computed once.
        progress: told which layer is computed.

    Raises:
        CheckpointError: the vocabularies are of different sizes; a file lacks what a forward pass needs; a
            trace is of other tokens, or lacks logits.
    """
    rows = list(positions)
    sizes = [_vocabulary(side) for side in (model, ref)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the model has logits of {sizes[0]} tokens, the reference of {sizes[1]}: they do not correspond",
            file=model.trace.info.path if isinstance(model, Traced) else model.checkpoint.path,
            fix="compare two files of one vocabulary; `python -m aprjax inspect` shows both sizes",
        )
    runners = [side for side in (ref, model) if not isinstance(side, Traced)]
    computed = _Lockstep(runners, list(tokens), files, shared or Shared(), progress).logits(rows)
    recorded = {id(side): _recorded(side, tokens, rows) for side in (model, ref) if isinstance(side, Traced)}
    for begin in range(0, len(rows), LOGIT_ROWS):
        # With two traces nothing is computed.
        fresh = dict(zip(map(id, runners), next(computed), strict=True)) if runners else {}
        pair = [next(recorded[id(side)]) if isinstance(side, Traced) else fresh[id(side)] for side in (model, ref)]
        yield rows[begin : begin + LOGIT_ROWS], pair[0], pair[1]


def _vocabulary(side: Side) -> int:
    if not isinstance(side, Traced):
        return side.checkpoint.config.vocab_size
    return _trace_logits(side).shape[1]


@dataclass
class _Lockstep:
    """One or two models on the same tokens; one layer of each is in memory at a time."""

    sides: list[Runner]
    tokens: list[int]
    files: FilesReport | None
    shared: Shared
    progress: Progress

    def __post_init__(self) -> None:
        for side in self.sides:
            require_runnable(side.checkpoint)
            check_tokens(side.checkpoint, self.tokens)
        self._weights = WeightSource((lambda name: False) if self.files is None else self.files.same_bytes)

    def logits(self, rows: list[int]) -> Iterator[list[np.ndarray]]:
        """The sides' logits by batches of positions."""
        hidden = self._last_hidden()
        once = self._same_program({_NORM, _HEAD}) and np.array_equal(hidden[0], hidden[-1])
        kept = self.sides[:1] if once else self.sides
        self._weights.clear()
        heads = [
            (load_norm(side.checkpoint, _NORM), self._weights(replace(head_tensor(side.checkpoint), name=_HEAD)))
            for side in kept
        ]
        for begin in range(0, len(rows), LOGIT_ROWS):
            chosen = rows[begin : begin + LOGIT_ROWS]
            found = []
            for side, (norm, head), value in zip(kept, heads, hidden, strict=False):
                with precision_scope(side.arithmetic):
                    normed = run_norm(norm, jnp.asarray(value[chosen]), arithmetic=side.arithmetic)
                    found.append(np.asarray(run_head(head, normed, arithmetic=side.arithmetic), np.float32))
            yield found * 2 if once else found

    def _last_hidden(self) -> list[np.ndarray]:
        """The sides' last hidden states, padding included."""
        run_by = [side.arithmetic for side in self.sides]
        hidden = [embed_padded(side.checkpoint, self.tokens, *run_by) for side in self.sides]
        contexts = [side.context(len(hidden[0])) for side in self.sides]
        layers = max((side.checkpoint.config.num_layers for side in self.sides), default=0)
        for index in range(layers):
            self.progress("layers", index, layers)
            self._weights.clear()
            prefix = f"model.layers.{index}."
            names = {name for side in self.sides for name in side.checkpoint.tensors if name.startswith(prefix)}
            # The same program on the same bytes and inputs gives the same bits: no need to compute them again.
            once = self._same_program(names) and np.array_equal(hidden[0], hidden[-1])
            for at, side in enumerate(self.sides[:1] if once else self.sides):
                layer = load_layer(side.checkpoint, index, self._weights)
                hidden[at] = _run(side, layer, hidden[at], contexts[at])
            if once:
                hidden = [hidden[0]] * len(self.sides)
            self.shared.layers += once
        self.shared.of += layers
        self.progress("layers", layers, layers)
        return hidden

    def _same_program(self, names: set[str]) -> bool:
        """Whether two sides would run one program on the same bytes."""
        if self.files is None or len(self.sides) != 2 or self.sides[0].arithmetic != self.sides[1].arithmetic:
            return False
        configs = [side.checkpoint.config for side in self.sides]
        if any(getattr(configs[0], key) != getattr(configs[1], key) for key in _READ):
            return False
        return all(self.files.same_bytes(name) for name in names)


def _run(side: Runner, layer: DecoderLayer, hidden: np.ndarray, context: Context) -> np.ndarray:
    with precision_scope(side.arithmetic):
        given = jnp.asarray(hidden)
        return np.asarray(run_layer(layer, given, context, {}, {}, arithmetic=side.arithmetic, capture=False)[0])


def _trace_logits(side: Traced) -> np.ndarray:
    if (OUTSIDE, Stage.LM_HEAD) not in set(side.trace):
        raise CheckpointError(
            "the trace has no logits (lm_head): there are no margins to compare",
            file=side.trace.info.path,
            fix="record it with the stage lm_head, or give the engine or the file itself as a side",
        )
    return side.trace[OUTSIDE, Stage.LM_HEAD]


def _recorded(side: Traced, tokens: Sequence[int], rows: list[int]) -> Iterator[np.ndarray]:
    """A trace's logits by batches of positions."""
    info = side.trace.info
    if info.tokens != tuple(tokens):
        raise CheckpointError(
            f"the trace is of {len(info.tokens)} tokens, and is to be compared on {len(tokens)} others",
            file=info.path,
            fix="leave prompt and continuation out to take the trace's own tokens, or trace these",
        )
    at = {position: row for row, position in enumerate(info.head_positions)}
    missing = [position for position in rows if position not in at]
    if missing:
        raise CheckpointError(
            f"the trace has no logits at {len(missing)} of the compared positions, the first is {missing[0]}",
            file=info.path,
            fix="ask for --positions that the trace has, or record it again with all",
        )
    logits = _trace_logits(side)
    for begin in range(0, len(rows), LOGIT_ROWS):
        yield np.asarray(logits[[at[position] for position in rows[begin : begin + LOGIT_ROWS]]], np.float32)
