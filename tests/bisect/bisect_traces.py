"""Traces of tiny models: sound ones, and such with a kernel fault at one node that all that follows inherits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tiny import CONFIG, tiny_checkpoint, write_tiny

from aprjax.bisect.replay.layers import padded, stage_widths
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, Stage
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.model import Qwen2, causal_context, embed_padded, run_head, run_layer, run_norm, trim
from aprjax.trace import MemoryTrace, TraceInfo

# Those of test_layers.py, so that both share compiled programs.
TOKENS = (5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7)
TYPES = {"": "Q4_K", "v_proj": "Q6_K", "down_proj": "Q6_K", "lm_head": "Q6_K"}
LAYERS = 2

# From a stage's sound value and the layer's values up to it: the faulty value.
Fault = Callable[[np.ndarray, Mapping[Stage, np.ndarray]], np.ndarray]


def tiny_file(folder: Path) -> Checkpoint:
    return write_tiny(folder / "file.apr", tiny_checkpoint(replace(CONFIG, num_layers=LAYERS), types=TYPES))


def trace_info(checkpoint: Checkpoint, arithmetic: str) -> TraceInfo:
    everyone = tuple(range(len(TOKENS)))
    return TraceInfo(
        path=str(checkpoint.path),
        sha256=checkpoint.sha256(),
        format=checkpoint.format,
        arithmetic=arithmetic,
        tokens=TOKENS,
        positions=everyone,
        head_positions=everyone,
    )


def sound_trace(checkpoint: Checkpoint, arithmetic: Arithmetic) -> MemoryTrace:
    """What the model computes, undisturbed."""
    _, values = Qwen2(checkpoint, arithmetic).run_with_cache(list(TOKENS))
    return MemoryTrace(trace_info(checkpoint, arithmetic.name), {key: np.asarray(v) for key, v in values.items()})


def faulty_trace(
    checkpoint: Checkpoint, arithmetic: Arithmetic, faults: Mapping[tuple[int, Stage], Fault]
) -> MemoryTrace:
    """A trace by `arithmetic`, computed on from the faulty values, as an engine with those faults does."""
    model = Qwen2(checkpoint, arithmetic)
    count = len(TOKENS)
    hidden = embed_padded(checkpoint, list(TOKENS))
    context = causal_context(checkpoint.config, arithmetic, length=len(hidden))
    widths = stage_widths(checkpoint.config, count)
    values = {(OUTSIDE, Stage.EMBEDDING): hidden[:count]}
    for index, layer in enumerate(model.layers):
        here = {stage: np.zeros((count, widths[stage]), np.float32) for stage in LAYER_STAGES}
        # Every stage is replaced by what it was last computed to be, so that one program serves all faults; a
        # layer is as deep as it has stages.
        for _ in LAYER_STAGES:
            given = {stage: padded(stage, value, len(hidden)) for stage, value in here.items()}
            _, _, captured = run_layer(layer, hidden, context, given, {}, arithmetic=arithmetic, capture=True)
            computed = {stage: trim(stage, np.array(captured[stage]), count) for stage in LAYER_STAGES}
            for at, fault in faults.items():
                if at[0] == index:
                    computed[at[1]] = fault(computed[at[1]].copy(), here).astype(np.float32)
            here = computed
        values.update({(index, stage): value for stage, value in here.items()})
        hidden = padded(Stage.POST_FFN_RESIDUAL, here[Stage.POST_FFN_RESIDUAL], len(hidden))
    normed = np.asarray(run_norm(model.norm, jnp.asarray(hidden[:count]), arithmetic=arithmetic))
    normed = _faulty(faults, Stage.FINAL_NORM, normed)
    logits = np.asarray(run_head(model.head, jnp.asarray(normed), arithmetic=arithmetic))
    values[OUTSIDE, Stage.FINAL_NORM] = normed
    values[OUTSIDE, Stage.LM_HEAD] = _faulty(faults, Stage.LM_HEAD, logits)
    return MemoryTrace(trace_info(checkpoint, arithmetic.name), values)


def _faulty(faults: Mapping[tuple[int, Stage], Fault], stage: Stage, value: np.ndarray) -> np.ndarray:
    fault = faults.get((OUTSIDE, stage))
    return value if fault is None else fault(value.copy(), {}).astype(np.float32)
