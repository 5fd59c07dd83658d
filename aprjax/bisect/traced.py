"""Sides that ran elsewhere: a trace against a file, a file against a trace, or two traces.

A trace cannot be run again from another side's inputs. Its local difference is measured the other way
round: the file computes each stage from the *trace's* inputs (`replay_run`), and the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.lockstep import LayerPair, Runner, Values
from aprjax.bisect.replay.layers import ReplayedLayer, replay_layers, require_comparable, visible_part
from aprjax.bisect.report import SideInfo
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic, MatrixKernel
from aprjax.qwen2.model import embed_padded, precision_scope, run_head, run_norm, trim
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import AnyTrace

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Traced:
    """One side: a trace.

    Attributes:
        trace: its values.
        checkpoint: the file that it was made from, if it is at hand.
        arithmetic: the preset that comes nearest to what computed it.
    """

    trace: AnyTrace
    checkpoint: Checkpoint | None
    arithmetic: Arithmetic

    @property
    def engine(self) -> str:
        """What computed it, for a sentence."""
        return self.trace.info.arithmetic

    @property
    def missing(self) -> list[str]:
        """The stages that it lacks in every layer, or outside the layers."""
        present = {stage for _, stage in self.trace}
        return [str(stage) for stage in Stage if stage not in present]


Side = Runner | Traced


def side_info(side: Side) -> SideInfo:
    """What a report says of a side: file, format, and what computed it."""
    if isinstance(side, Traced):
        info = side.trace.info
        return SideInfo(info.path, info.sha256, f"trace of {info.format}", info.arithmetic)
    checkpoint = side.checkpoint
    return SideInfo(str(checkpoint.path), checkpoint.sha256(), checkpoint.format, side.arithmetic.name)


def arithmetic_of(trace: AnyTrace) -> Arithmetic | None:
    """The preset that a trace names, or that is its engine's; None where nothing is known of it."""
    name = trace.info.arithmetic
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("llama.cpp"):
        return llama_preset(trace.info.engine)
    known = {"apr": "realizar", "realizar": "realizar", "transformers": "float32", "torch": "float32"}
    return next((PRESETS[preset] for prefix, preset in known.items() if name.startswith(prefix)), None)


def llama_preset(options: Mapping[str, str]) -> Arithmetic:
    """The arithmetic of llama.cpp run with these options, in the build whose features `system_info` lists.

    To the bit where the engine can be followed so far: on x86 with AVX2, in one batch or where a batch makes no
    difference.
    """
    features = options.get("system_info", "")
    # Only an explicit float32 cache is one: llama.cpp's default is float16.
    half = options.get("type_k") != "f32" or options.get("flash_attention") == "True"
    kernels: dict[MatrixKernel, bool] = {
        "repack": options.get("repack") == "True" and "REPACK = 1" in features,
        "tiled": options.get("tiled") == "True",
        "tinyblas": "LLAMAFILE = 1" in features,
    }
    arithmetic = replace(
        PRESETS["llama.cpp"],
        kv_cache="float16" if half else "model",
        attention="flash" if options.get("flash_attention") == "True" else "plain",
        vectors="avx512" if "AVX512 = 1" in features else "avx2",
    )
    known = all(options.get(key) in ("True", "False") for key in ("tiled", "repack", "flash_attention"))
    followed = "AVX2 = 1" in features or not features
    if known and followed and not ("step" in options and any(kernels.values())):
        arithmetic = replace(arithmetic, exact=True, kernels=tuple(kernel for kernel, has in kernels.items() if has))
    else:
        arithmetic = replace(arithmetic, vectors="avx2")
    return _named(arithmetic)


def _named(arithmetic: Arithmetic) -> Arithmetic:
    """The preset that it is, or a name of its own choices."""
    for known in PRESETS.values():
        if replace(arithmetic, name=known.name) == known:
            return known
    choices = [*arithmetic.kernels, *(["flash"] if arithmetic.attention == "flash" else [])]
    choices += [word for word, has in (("f16", arithmetic.kv_cache == "float16"),) if has and "flash" not in choices]
    choices += ["avx512"] if arithmetic.vectors == "avx512" else []
    name = "-".join(["llama.cpp", *(["exact"] if arithmetic.exact else [])])
    return replace(arithmetic, name=f"{name}[{','.join(choices)}]")


def traced_pairs(model: Side, ref: Side, tokens: list[int], rows: list[int]) -> Iterator[tuple[list[int], LayerPair]]:
    """Yields (positions of the rows, both sides): the embedding, every layer, then the head in batches.

    Raises:
        CheckpointError: a trace has other shapes than the file's, or lacks positions; or two traces come
            without a file to judge them by.
    """
    if isinstance(model, Traced):
        yield from _judged_by_reference(model, ref, tokens, rows)
    elif isinstance(ref, Traced):
        yield from _judged_by_trace(model, ref, tokens, rows)


def _judged_by_reference(
    model: Traced, ref: Side, tokens: list[int], rows: list[int]
) -> Iterator[tuple[list[int], LayerPair]]:
    """The model's trace against the reference's file, computed from the trace's inputs."""
    if ref.checkpoint is None:
        raise CheckpointError(
            "two traces, and the file that the reference's was made from is not at hand",
            file=ref.trace.info.path if isinstance(ref, Traced) else None,
            fix="give the reference's file as --ref, or put it back where the trace says that it was",
        )
    arithmetics = tuple(dict.fromkeys((ref.arithmetic, model.arithmetic)))
    require_comparable(model.trace, ref.checkpoint)
    other: Callable[[ReplayedLayer], Values]
    if isinstance(ref, Traced):
        require_comparable(ref.trace, ref.checkpoint)
        other = _reader(ref.trace)
    else:
        other = _FreeRun(ref, tokens)
    for replayed in replay_layers(model.trace, ref.checkpoint, arithmetics):
        if replayed.beyond:
            yield list(replayed.positions), _beyond(replayed)
            continue
        traced, theirs = _masked(replayed.traced), _masked(other(replayed))
        expected = _masked(replayed.compute(0, _NOTHING))
        mixed = _masked(replayed.compute(1, _NOTHING)) if len(arithmetics) > 1 else None

        def rounding(replayed: ReplayedLayer = replayed) -> Values:
            return _masked(replayed.judge(0, _NOTHING))

        pair = LayerPair(replayed.layer, traced, theirs, traced, mixed, rounding, against=expected, rounded=expected)
        yield from _batches(pair, replayed, rows)


def _judged_by_trace(
    model: Runner, ref: Traced, tokens: list[int], rows: list[int]
) -> Iterator[tuple[list[int], LayerPair]]:
    """The model's file, computed from the reference trace's inputs, against that trace."""
    require_comparable(ref.trace, model.checkpoint)
    free = _FreeRun(model, tokens)
    source = ref.checkpoint if model.arithmetic != ref.arithmetic else None
    same_file = None if source is None else replay_layers(ref.trace, source, (model.arithmetic,))
    for replayed in replay_layers(ref.trace, model.checkpoint, (model.arithmetic,)):
        if replayed.beyond:
            if same_file is not None:
                next(same_file)
            yield list(replayed.positions), _beyond(replayed)
            continue
        expected, traced = _masked(replayed.compute(0, _NOTHING)), _masked(replayed.traced)
        mixed = None if same_file is None else _masked(next(same_file).compute(0, _NOTHING))

        def rounding(replayed: ReplayedLayer = replayed) -> Values:
            return _masked(replayed.judge(0, _NOTHING))

        pair = LayerPair(replayed.layer, _masked(free(replayed)), traced, expected, mixed, rounding, rounded=expected)
        yield from _batches(pair, replayed, rows)


def _beyond(replayed: ReplayedLayer) -> LayerPair:
    return LayerPair(replayed.layer, {}, {}, {}, None, dict, beyond=tuple(replayed.through))


def _masked(values: Values) -> Values:
    """Engines leave other things at masked keys, which no result depends on."""
    return {stage: visible_part(stage, value) for stage, value in values.items()}


class _FreeRun:
    """A file's own forward pass, layer by layer, with the weights that the replay has loaded."""

    def __init__(self, runner: Runner, tokens: list[int]) -> None:
        self.runner = runner
        self.count = len(tokens)
        self.hidden = embed_padded(runner.checkpoint, tokens, runner.arithmetic)
        self.context = runner.context(len(self.hidden))

    def __call__(self, replayed: ReplayedLayer) -> Values:
        if replayed.module is None:
            return {Stage.EMBEDDING: self.hidden[: self.count]}
        if replayed.layer != OUTSIDE:
            self.hidden, captured = self.runner.run(replayed.module, self.hidden, self.context)
            return {stage: trim(stage, value, self.count) for stage, value in captured.items()}
        arithmetic, (norm, head) = self.runner.arithmetic, replayed.module
        with precision_scope(arithmetic):
            normed = run_norm(norm, jnp.asarray(self.hidden[list(replayed.positions)]), arithmetic=arithmetic)
            logits = run_head(head, normed, arithmetic=arithmetic)
        return {Stage.FINAL_NORM: np.asarray(normed), Stage.LM_HEAD: np.asarray(logits)}


def _reader(trace: AnyTrace) -> Callable[[ReplayedLayer], Values]:
    present = set(trace)

    def read(replayed: ReplayedLayer) -> Values:
        stages = [stage for stage in Stage if stage in replayed.through and (replayed.layer, stage) in present]
        values = {stage: trace[replayed.layer, stage] for stage in stages}
        if Stage.LM_HEAD not in replayed.through:
            return values
        at = {position: row for row, position in enumerate(trace.info.head_positions)}
        missing = [position for position in replayed.positions if position not in at]
        if missing:
            raise CheckpointError(
                f"the reference's trace lacks the head's values at position {missing[0]}",
                file=trace.info.path,
                fix="record both traces with the same head positions",
            )
        chosen = [at[position] for position in replayed.positions]
        return {stage: value[chosen] for stage, value in values.items()}

    return read


def _batches(pair: LayerPair, replayed: ReplayedLayer, rows: list[int]) -> Iterator[tuple[list[int], LayerPair]]:
    """A layer's pair as it is; the head's, which comes some positions at a time, cut to the compared ones."""
    if Stage.LM_HEAD not in replayed.through:
        yield rows, pair
        return
    at = {position: row for row, position in enumerate(replayed.positions)}
    chosen = [position for position in rows if position in at]
    lines = [at[position] for position in chosen]
    if not chosen:
        return

    def cut(values: Values | None) -> Any:
        return None if values is None else {stage: value[lines] for stage, value in values.items()}

    yield (
        chosen,
        LayerPair(
            pair.layer,
            cut(pair.model),
            cut(pair.ref),
            cut(pair.local),
            cut(pair.local_ref_file),
            lambda: cut(pair.rounding()),
            cut(pair.against),
            cut(pair.rounded),
        ),
    )
