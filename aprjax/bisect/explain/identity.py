"""What a trace *is*, from its values and its file alone, before any ratio is computed.

Labels do not say everything: an APRT file has neither shape nor positions, tokens nor capture point. So the file is
run once on the tokens whose embedding rows the trace holds, and each dumped value is looked for among the file's own
values: at its label, at the places before and after it, in the layers beside, at every position, in other orders of
axes. A label is doubted only where another reading is clearly nearer, and what was computed from the value does not
show that the engine went on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from aprjax.bisect.explain.identity_dump import Dump, Key, dump_of, other_model
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.explain.identity_health import execution_order, half_finding, half_type, not_finite
from aprjax.bisect.explain.identity_match import Reading, read_value
from aprjax.bisect.explain.identity_points import Point, points_of, run_file
from aprjax.bisect.explain.identity_prompts import token_findings
from aprjax.bisect.explain.identity_readings import Spread, reading_findings, spread_of
from aprjax.bisect.explain.identity_tokens import RecoveredTokens, recover_tokens, rows_are
from aprjax.bisect.traced import arithmetic_of
from aprjax.checkpoint.types import Checkpoint, ModelConfig
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.loading import require_runnable
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import AnyTrace
from aprjax.trace.aprt import HEAD_STAGES

# Stages that depend on a row's position: they tell a run without its first tokens from a dump without its first rows.
_POSITIONAL = (Stage.Q_POST_ROPE, Stage.K_POST_ROPE, Stage.ATTENTION, Stage.ATTN_OUT, Stage.POST_FFN_RESIDUAL)


def identify(
    trace: AnyTrace | str | Path,
    checkpoint: Checkpoint,
    *,
    tokens: list[int] | tuple[int, ...] | None = None,
    prompt: str | None = None,
    wrap: str = "none",
    arithmetic: Arithmetic | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[IdentityFinding, ...]:
    """Says what a trace is where its labels, tokens or sidecar do not; nothing where they are right.

    Args:
        trace: of any engine, or the path of an APRT folder that nothing vouches for.
        checkpoint: the file that it claims to have run.
        tokens: what is claimed to have been fed; by default the trace's own, or those of the prompt.
        prompt: the same as text, tokenized by the file.
        wrap: how often the template goes around `prompt`.
        arithmetic: how the file is run; by default as the trace says of itself, else in float32.
        progress: told what is being done, and how far it is.

    Returns:
        The findings; those that forbid a comparison altogether (`other-model`) alone.

    Raises:
        CheckpointError: the trace or the file cannot be read, or the file cannot be run.
    """
    require_runnable(checkpoint)
    if tokens is None and prompt is not None:
        from aprjax.text.prompt import encode_prompt

        tokens = encode_prompt(checkpoint, prompt, wrap)
    dump = dump_of(trace, None if tokens is None else tuple(tokens))
    refusal = other_model(dump, checkpoint)
    if refusal is not None:
        return (refusal,)
    if arithmetic is None:
        arithmetic = (None if isinstance(trace, str | Path) else arithmetic_of(trace)) or preset("float32")
    progress("identifying", 0, checkpoint.config.num_layers)
    bad = not_finite(dump, checkpoint)
    findings = [] if bad is None else [bad]
    recovered = recovered_tokens(dump, checkpoint)
    if recovered is not None:
        findings += token_findings(recovered, dump.tokens, checkpoint)
    run = _run_tokens(dump, recovered, checkpoint, arithmetic)
    if run is None:
        return tuple(findings)
    if run != dump.tokens:
        same = dump.tokens is not None and len(dump.tokens) == len(run)
        dump = replace(dump, tokens=run, **({} if same else {"positions": None, "head_positions": None}))
    return (*findings, *_of_values(dump, checkpoint, run, arithmetic, progress))


def recovered_tokens(dump: Dump, checkpoint: Checkpoint) -> RecoveredTokens | None:
    """The tokens that the trace's rows are of; None where they are those claimed, or nothing tells."""
    hidden = checkpoint.config.hidden_size
    keys = set(dump.keys)
    if (OUTSIDE, Stage.EMBEDDING) in keys:
        rows = dump.flat((OUTSIDE, Stage.EMBEDDING)).reshape(-1, hidden)
        rows = rows[: _last_row(rows)]
        if not len(rows) or not np.isfinite(rows).all():
            return None
        claimed = dump.tokens if dump.positions is None else _at(dump.tokens, dump.positions)
        if claimed is not None and rows_are(rows, claimed, checkpoint):
            return None
        return recover_tokens(rows, checkpoint)
    if (0, Stage.ATTN_NORM) not in keys or dump.positions is not None:
        return None
    rows = dump.flat((0, Stage.ATTN_NORM)).reshape(-1, hidden)
    rows = rows[: _last_row(rows)]
    if not len(rows) or not np.isfinite(rows).all():
        return None
    weight = checkpoint.tensors["model.layers.0.input_layernorm.weight"].decode()
    found = recover_tokens(rows, checkpoint, norm_weight=weight)
    # It may also be a norm that was captured otherwise: then it says nothing of the tokens.
    return found if found.known is not None and found.known != dump.tokens else None


def _at(tokens: tuple[int, ...] | None, positions: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if tokens is None else tuple(tokens[position] for position in positions if position < len(tokens))


def _last_row(rows: np.ndarray) -> int:
    """Rows up to the last that is not all zero: behind it is padding."""
    filled = np.flatnonzero(rows.any(axis=1))
    return int(filled[-1]) + 1 if filled.size else 0


def _run_tokens(
    dump: Dump, recovered: RecoveredTokens | None, checkpoint: Checkpoint, arithmetic: Arithmetic
) -> tuple[int, ...] | None:
    """The tokens that the file is to be run on: those of the rows, or those claimed where rows were left out."""
    found = None if recovered is None else recovered.known
    if found is None or dump.tokens is None:
        return found or dump.tokens
    claimed = dump.tokens
    telling = any(layer == 0 and stage in _POSITIONAL for layer, stage in dump.keys)
    if len(found) >= len(claimed) or not set(found) <= set(claimed) or not telling:
        return found
    # Fewer rows than tokens: rows that were not dumped, or tokens that were not run? Layer 0 knows.
    distances = {}
    for tokens in (claimed, found):
        changed = replace(dump, tokens=tokens, positions=None, head_positions=None)
        readings = _read(changed, checkpoint, tokens, arithmetic, layers=1).readings
        near = [r.distance for key, r in readings.items() if key[1] in _POSITIONAL]
        distances[tokens] = max(near, default=0.0)
    return min((claimed, found), key=lambda tokens: distances[tokens])


def _of_values(
    dump: Dump,
    checkpoint: Checkpoint,
    run: tuple[int, ...],
    arithmetic: Arithmetic,
    progress: Callable[[str, int, int], None],
) -> Iterator[IdentityFinding]:
    layers = checkpoint.config.num_layers
    top = 1 + max((layer for layer, _ in dump.keys), default=-1)
    # One more layer: a value may be labelled by the layer before its own.
    end = layers if any(s in HEAD_STAGES for _, s in dump.keys) else min(layers, top + 1) if top else 0
    read = _read(dump, checkpoint, run, arithmetic, layers=end, progress=progress)
    yield from reading_findings(read.readings, read.spreads, count=len(run), layers=layers)
    half = half_finding({key: read.halves[key] for key in execution_order(read.halves)})
    if half is not None:
        yield half


@dataclass
class _Read:
    """How the values of a dump are read.

    Attributes:
        readings: by label.
        spreads: of values that hold other positions than all.
        halves: the half-precision type that values went through, empty for none.
    """

    dump: Dump
    config: ModelConfig
    count: int
    readings: dict[Key, Reading] = field(default_factory=dict)
    spreads: dict[Key, Spread] = field(default_factory=dict)
    halves: dict[Key, str] = field(default_factory=dict)

    def add(self, keys: list[Key], points: dict[Point, np.ndarray]) -> None:
        """Reads some values, given the file's around them."""
        for key in keys:
            reading = read_value(self.dump, key, points, self.config, self.count)
            if reading is None:
                continue
            self.readings[key] = reading
            rows = reading.rows
            if reading.close and rows and len(rows) < self.count and min(rows) >= 0:
                self.spreads[key] = spread_of(points[reading.point], rows)
            half = half_type(self.dump.flat(key), points[Point(*key)])
            if half is not None:
                self.halves[key] = half


def _read(
    dump: Dump,
    checkpoint: Checkpoint,
    run: tuple[int, ...],
    arithmetic: Arithmetic,
    *,
    layers: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> _Read:
    """Reads every value, layer by layer: no more than three layers of the file's values are held."""
    by_layer: dict[int, list[Key]] = {}
    for key in dump.keys:
        by_layer.setdefault(key[0], []).append(key)
    read = _Read(dump, checkpoint.config, len(run))
    held: dict[int, dict[Point, np.ndarray]] = {}

    def around(number: int) -> dict[Point, np.ndarray]:
        near = (number - 1, number, number + 1)
        return {point: value for layer in near for point, value in held.get(layer, {}).items()}

    head = any(stage in HEAD_STAGES for _, stage in dump.keys) and layers == checkpoint.config.num_layers
    number = OUTSIDE
    # Steps: -1 is the embedding, then the layers, and `layers` what comes behind them.
    for number, (layer, values) in enumerate(run_file(checkpoint, run, arithmetic, layers=layers, head=head), OUTSIDE):
        held[number] = points_of(layer, values, checkpoint)
        progress("identifying", max(0, min(number + 1, layers)), layers)
        if number > OUTSIDE:
            read.add(_of(number - 1, by_layer, layers), around(number - 1))
        held.pop(number - 2, None)
    read.add(_of(number, by_layer, layers), around(number))
    return read


def _of(number: int, by_layer: dict[int, list[Key]], layers: int) -> list[Key]:
    """The dumped values that belong to a step of the run."""
    outside = by_layer.get(OUTSIDE, [])
    if number == OUTSIDE:
        return [key for key in outside if key[1] is Stage.EMBEDDING]
    if number >= layers:
        return [key for key in outside if key[1] in HEAD_STAGES]
    return by_layer.get(number, [])
