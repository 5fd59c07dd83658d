"""Runs a file over a trace: every stage of a layer computed from the trace's own inputs.

Each stage's value is replaced by the trace's as it passes, so that what is captured is what the *file* gives
from the inputs that the engine had. A stage that the trace lacks goes on as the file computes it: its
consumers are then judged over more than one operation, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.lockstep import Runner, Values, arbiter
from aprjax.checkpoint.types import Checkpoint, CheckpointError, ModelConfig
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import bucket, embed_padded, precision_scope, run_head, run_norm, trim
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, STAGE_INPUTS, Stage
from aprjax.qwen2.streaming import head_batches
from aprjax.trace import AnyTrace, Trace

BY_KEY = (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)  # stages whose width is heads * key positions


def stage_widths(config: ModelConfig, positions: int) -> dict[Stage, int]:
    """The width of every stage's value; scores and probabilities have one column per head and key."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.num_heads * positions
    return {
        **dict.fromkeys(Stage, hidden),
        Stage.QKV_MATMUL: q + 2 * kv,
        Stage.QKV_BIAS: q + 2 * kv,
        Stage.Q_POST_ROPE: q,
        Stage.K_POST_ROPE: kv,
        Stage.ATTN_SCORES: keys,
        Stage.ATTN_SOFTMAX: keys,
        Stage.ATTENTION: q,
        **dict.fromkeys((Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SILU, Stage.FFN_SWIGL), inner),
        Stage.LM_HEAD: config.vocab_size,
    }


def require_comparable(trace: AnyTrace, checkpoint: Checkpoint) -> None:
    """Checks that the trace holds whole prompts of this model.

    Raises:
        CheckpointError: positions are missing, or a value has another shape than the config implies.
    """
    info, config = trace.info, checkpoint.config
    count = len(info.tokens)
    if count == 0:
        raise CheckpointError("the trace names no tokens", file=info.path, fix="record the trace again with its tokens")
    if tuple(info.positions) != tuple(range(count)):
        raise CheckpointError(
            f"expected values of all {count} positions, found those of {_ranges(info.positions)}",
            file=info.path,
            fix="attention needs every earlier position: record the trace again with all positions",
        )
    if any(not 0 <= row < count for row in info.head_positions):
        raise CheckpointError(
            f"the head's positions {_ranges(info.head_positions)} lie outside the {count} tokens", file=info.path
        )
    widths = stage_widths(config, count)
    shapes: Mapping[tuple[int, Stage], tuple[int, ...]] | None = getattr(trace, "shapes", None)
    for key in trace:
        layer, stage = key
        if layer >= config.num_layers:
            raise CheckpointError(
                f"the trace has a layer {layer}, the file {config.num_layers} layers",
                file=info.path,
                fix="give the file that the trace was made with",
            )
        head = stage in (Stage.FINAL_NORM, Stage.LM_HEAD)
        expected = (len(info.head_positions) if head else count, widths[stage])
        found = tuple(trace[key].shape if shapes is None else shapes[key])
        if found != expected:
            raise CheckpointError(
                f"expected shape {list(expected)} for {stage} of layer {layer}, found {list(found)}",
                file=info.path,
                fix="the trace belongs to another model, or was taken at another point",
            )


def _ranges(positions: Iterable[int]) -> str:
    values = list(positions)
    if len(values) > 6:
        return f"{len(values)} positions from {min(values)} to {max(values)}"
    return ", ".join(map(str, values)) or "none"


def padded(stage: Stage, value: np.ndarray, length: int) -> np.ndarray:
    """The inverse of `trim`: zeros for the positions, and of scores the keys, up to `length`."""
    count = value.shape[0]
    if stage not in BY_KEY:
        return np.pad(value, ((0, length - count), (0, 0)))
    by_head = value.reshape(count, -1, count)
    grown = np.pad(by_head, ((0, length - count), (0, 0), (0, length - count)))
    return grown.reshape(length, -1)


@dataclass
class ReplayedLayer:
    """One layer of a trace, and what the file gives from the trace's own inputs.

    Attributes:
        layer: its number; -1 for the stages outside the layers.
        traced: the trace's values; a stage that it lacks is absent.
        compute: the file's values under an arithmetic (by its place in the list), with the stages of the
            second argument recomputed by the file instead of taken from the trace ("previous" stands for
            the layer's input).
        judge: the same with sums in the other precision: how far rounding goes.
        through: by stage, the stages that the trace lacks and that were recomputed on the way to it.
        spoiled: stages some of whose inputs in the trace are not finite.
        positions: of the rows.
        module: the file's layer, laid out for computing; of the last one the norm and the head.
    """

    layer: int
    traced: Values
    compute: Callable[[int, frozenset[str]], Values]
    judge: Callable[[int, frozenset[str]], Values]
    through: dict[Stage, tuple[str, ...]]
    spoiled: set[Stage]
    positions: tuple[int, ...]
    module: Any = None

    @property
    def beyond(self) -> bool:
        """Whether the trace holds nothing from here on, so that nothing is computed either."""
        return self.module is None and Stage.EMBEDDING not in self.through


def other_precision(arithmetic: Arithmetic) -> Arithmetic:
    """What the rounding of an arithmetic is measured against: float64 sums, or float32 where it has those."""
    if arithmetic.dtype == "float64":
        return replace(arithmetic, name="arbiter", dtype="float32")
    # Only what float64 reads, so that presets which differ in nothing else share a compiled program.
    judge = arbiter(arithmetic)
    return Arithmetic(
        "arbiter",
        matmul=judge.matmul,
        dtype=judge.dtype,
        kv_cache=judge.kv_cache,
        rope=judge.rope,
        activations=judge.activations,
    )


@dataclass
class _Flow:
    """What is known of a layer's input, carried from layer to layer."""

    through: tuple[str, ...] = ()
    spoiled: bool = False
    # The layer's input by arithmetic: the trace's where it has it, else as the file computes it.
    hidden: dict[Any, np.ndarray] = field(default_factory=dict)
    # The input as the file computes it, whatever the trace says.
    own: dict[Any, np.ndarray] = field(default_factory=dict)


def replay_layers(
    trace: AnyTrace, checkpoint: Checkpoint, arithmetics: tuple[Arithmetic, ...]
) -> Iterator[ReplayedLayer]:
    """Yields the embedding, every layer, and the final norm with the head some rows at a time, in execution order.

    What a `ReplayedLayer` computes must be asked for before the next one is taken: one layer is in memory.
    """
    present = set(trace)
    count, length = len(trace.info.tokens), bucket(len(trace.info.tokens), *arithmetics)
    everything = [*arithmetics, *(other_precision(a) for a in arithmetics)]
    sides = [Runner(checkpoint, a) for a in everything]
    contexts = [side.context(length) for side in sides]
    # The place of the first equal arithmetic, so that arbiters in common run once.
    same = [everything.index(a) for a in everything]
    half = len(arithmetics)

    embedded = embed_padded(checkpoint, list(trace.info.tokens), *arithmetics)
    first = ReplayedLayer(
        OUTSIDE,
        _values(trace, present, OUTSIDE, (Stage.EMBEDDING,)),
        lambda index, without: {Stage.EMBEDDING: embedded[:count]},
        lambda index, without: {Stage.EMBEDDING: embedded[:count]},
        {Stage.EMBEDDING: ()},
        set(),
        tuple(trace.info.positions),
    )
    yield first
    flow = _Flow()
    _advance(flow, Stage.EMBEDDING, first, {i: embedded for i in range(len(sides))}, length)

    # What follows the last value of the trace is not computed: there is nothing to compare it with.
    end = any(stage in (Stage.FINAL_NORM, Stage.LM_HEAD) for _, stage in present)
    last = checkpoint.config.num_layers if end else max((layer for layer, _ in present), default=OUTSIDE)
    for layer in range(checkpoint.config.num_layers):
        if layer > last:
            yield _nothing(layer, LAYER_STAGES, tuple(trace.info.positions))
            continue
        module = load_layer(checkpoint, layer)
        traced = _values(trace, present, layer, LAYER_STAGES)
        given = {stage: padded(stage, value, length) for stage, value in traced.items()}
        outputs: dict[tuple[int, frozenset[str]], tuple[np.ndarray, Values]] = {}

        def run(
            index: int,
            without: frozenset[str],
            module: Any = module,
            given: Values = given,
            outputs: dict[tuple[int, frozenset[str]], tuple[np.ndarray, Values]] = outputs,
        ) -> Values:
            index = same[index]
            key = (index, without)
            if key not in outputs:
                hidden = (flow.own if "previous" in without else flow.hidden)[index]
                kept = dict(given)
                _, captured = sides[index].run(module, hidden, contexts[index], kept)
                own = [stage for stage in kept if str(stage) in without]
                for _ in own:
                    # Replaced by what was computed, not left out: the same program runs. Once for each of
                    # them, since one may be computed from another.
                    kept.update({stage: captured[stage] for stage in own})
                    _, captured = sides[index].run(module, hidden, contexts[index], kept)
                # The layer's own output, not the trace's that takes its place.
                outputs[key] = (
                    captured[Stage.POST_FFN_RESIDUAL],
                    {stage: trim(stage, v, count) for stage, v in captured.items()},
                )
            return outputs[key][1]

        through, spoiled = _provenance(traced, flow)
        replayed = ReplayedLayer(
            layer,
            traced,
            run,
            lambda index, without, run=run: run(half + index, without),
            through,
            spoiled,
            tuple(trace.info.positions),
            module,
        )
        yield replayed
        # The arbiters' own outputs matter only where the trace has none to go on with.
        needed = half if Stage.POST_FFN_RESIDUAL in traced else len(sides)
        for index in range(needed):
            run(index, frozenset())
        ends = {i: outputs[same[i if i < needed else i - half], frozenset()][0] for i in range(len(sides))}
        _advance(flow, Stage.POST_FFN_RESIDUAL, replayed, ends, length)
    if end:
        yield from _final(trace, present, checkpoint, sides, flow)
    else:
        yield _nothing(OUTSIDE, (Stage.FINAL_NORM, Stage.LM_HEAD), tuple(trace.info.head_positions))


def _nothing(layer: int, stages: Iterable[Stage], positions: tuple[int, ...]) -> ReplayedLayer:
    """A layer that the trace has no value of."""

    def compute(index: int, without: frozenset[str]) -> Values:
        raise AssertionError("nothing is compared where the trace has no value")

    return ReplayedLayer(layer, {}, compute, compute, dict.fromkeys(stages, ()), set(), positions)


def _values(trace: AnyTrace, present: set[tuple[int, Stage]], layer: int, stages: Iterable[Stage]) -> Values:
    return {stage: np.asarray(trace[layer, stage]) for stage in stages if (layer, stage) in present}


def _provenance(traced: Values, flow: _Flow) -> tuple[dict[Stage, tuple[str, ...]], set[Stage]]:
    """For every stage of a layer: what was recomputed on the way, and whether an input is not finite."""
    finite = {stage: bool(np.isfinite(_visible(stage, value)).all()) for stage, value in traced.items()}
    through: dict[Stage, tuple[str, ...]] = {}
    spoiled: set[Stage] = set()
    for stage in LAYER_STAGES:
        passed: dict[str, None] = {}
        for source in STAGE_INPUTS[stage]:
            if source == "previous":
                passed.update(dict.fromkeys(flow.through))
                bad = flow.spoiled
            else:
                known = Stage(source)
                missing = known not in traced
                passed.update(dict.fromkeys((*through[known], source) if missing else ()))
                bad = known in spoiled if missing else not finite[known]
            if bad:
                spoiled.add(stage)
        through[stage] = tuple(passed)
    return through, spoiled


def _visible(stage: Stage, value: np.ndarray) -> np.ndarray:
    """Scores with the masked keys set to zero: no engine's result depends on them."""
    if stage is not Stage.ATTN_SCORES:
        return value
    count = value.shape[0]
    by_head = value.reshape(count, -1, count)
    return np.where(np.tri(count, dtype=bool)[:, None], by_head, np.float32(0)).reshape(value.shape)


visible_part = _visible


def _advance(flow: _Flow, stage: Stage, replayed: ReplayedLayer, ends: dict[Any, np.ndarray], length: int) -> None:
    """Carries a layer's output, the trace's where it has one, to the next layer."""
    flow.own = dict(ends)
    if stage in replayed.traced:
        value = replayed.traced[stage]
        flow.hidden = dict.fromkeys(ends, padded(stage, value, length))
        flow.through, flow.spoiled = (), not bool(np.isfinite(value).all())
    else:
        flow.hidden = dict(ends)
        where = f"layer {replayed.layer} {stage}" if replayed.layer != OUTSIDE else str(stage)
        flow.through, flow.spoiled = (*replayed.through[stage], where), stage in replayed.spoiled


def _final(
    trace: AnyTrace, present: set[tuple[int, Stage]], checkpoint: Checkpoint, sides: list[Runner], flow: _Flow
) -> Iterator[ReplayedLayer]:
    """The final norm and the head, `LOGIT_ROWS` positions at a time: the logits of a prompt are gigabytes."""
    rows = list(trace.info.head_positions)
    if not rows:
        yield _nothing(OUTSIDE, (Stage.FINAL_NORM, Stage.LM_HEAD), ())
        return
    modules = load_norm(checkpoint, "model.norm.weight"), pack(head_tensor(checkpoint))
    for lines in head_batches(len(rows)):
        traced = {
            stage: _rows(trace, (OUTSIDE, stage), lines)
            for stage in (Stage.FINAL_NORM, Stage.LM_HEAD)
            if (OUTSIDE, stage) in present
        }
        yield _final_rows(traced, rows[lines], modules, sides, flow)


def _rows(trace: AnyTrace, key: tuple[int, Stage], lines: slice) -> np.ndarray:
    return trace.rows(key, lines) if isinstance(trace, Trace) else np.asarray(trace[key][lines])


def _final_rows(
    traced: Values, rows: list[int], modules: tuple[Any, Any], sides: list[Runner], flow: _Flow
) -> ReplayedLayer:
    norm, head = modules
    cache: dict[tuple[int, frozenset[str]], Values] = {}

    def run(index: int, without: frozenset[str]) -> Values:
        key = (index, without)
        if key not in cache:
            arithmetic = sides[index].arithmetic
            hidden = (flow.own if "previous" in without else flow.hidden)[index][rows]
            with precision_scope(arithmetic):
                normed = np.asarray(run_norm(norm, jnp.asarray(hidden), arithmetic=arithmetic))
                own = Stage.FINAL_NORM not in traced or str(Stage.FINAL_NORM) in without
                fed = normed if own else traced[Stage.FINAL_NORM]
                logits = np.asarray(run_head(head, jnp.asarray(fed), arithmetic=arithmetic))
            cache[key] = {Stage.FINAL_NORM: normed, Stage.LM_HEAD: logits}
        return cache[key]

    through = {Stage.FINAL_NORM: flow.through}
    spoiled = {Stage.FINAL_NORM} if flow.spoiled else set[Stage]()
    normed = traced.get(Stage.FINAL_NORM)
    through[Stage.LM_HEAD] = (*flow.through, str(Stage.FINAL_NORM)) if normed is None else ()
    if (flow.spoiled and normed is None) or (normed is not None and not np.isfinite(normed).all()):
        spoiled.add(Stage.LM_HEAD)
    half = len(sides) // 2

    def judge(index: int, without: frozenset[str]) -> Values:
        return run(half + index, without)

    return ReplayedLayer(OUTSIDE, traced, run, judge, through, spoiled, tuple(rows), modules)
