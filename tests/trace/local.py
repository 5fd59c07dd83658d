"""aprjax's own value of every stage, computed from an engine's inputs to that stage: local, not inherited."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import OUTSIDE, Arithmetic, Stage
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import bucket, causal_context, run_head, run_layer, run_norm
from aprjax.trace import AnyTrace


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def local_differences(
    checkpoint: Checkpoint, trace: AnyTrace, arithmetic: Arithmetic, layers: list[int]
) -> dict[tuple[int, Stage], float]:
    """Relative L2 of every stage of these layers and of the head, each from the trace's own inputs."""
    count = len(trace.info.tokens)
    assert bucket(count) == count, "padding rows would need values, too"
    context = causal_context(checkpoint.config, arithmetic, length=count)
    found = {}
    for index in layers:
        before = (OUTSIDE, Stage.EMBEDDING) if index == 0 else (index - 1, Stage.POST_FFN_RESIDUAL)
        theirs = {stage: trace[layer, stage] for layer, stage in trace if layer == index}
        given = {stage: jnp.asarray(value) for stage, value in theirs.items()}
        _, _, ours = run_layer(
            load_layer(checkpoint, index),
            jnp.asarray(trace[before]),
            context,
            given,
            {},
            arithmetic=arithmetic,
            capture=True,
        )
        found |= {(index, stage): relative_l2(np.asarray(ours[stage]), value) for stage, value in theirs.items()}
    last = trace[checkpoint.config.num_layers - 1, Stage.POST_FFN_RESIDUAL]
    norm = run_norm(load_norm(checkpoint, "model.norm.weight"), jnp.asarray(last), arithmetic=arithmetic)
    found[OUTSIDE, Stage.FINAL_NORM] = relative_l2(np.asarray(norm), trace[OUTSIDE, Stage.FINAL_NORM])
    normed = jnp.asarray(trace[OUTSIDE, Stage.FINAL_NORM])
    logits = run_head(pack(head_tensor(checkpoint)), normed, arithmetic=arithmetic)
    found[OUTSIDE, Stage.LM_HEAD] = relative_l2(np.asarray(logits), trace[OUTSIDE, Stage.LM_HEAD])
    return found
