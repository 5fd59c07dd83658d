"""Kernel faults in NumPy, by hand: from a stage's inputs to what a wrong kernel makes of them. No code of `explain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf

import numpy as np
from bisect_traces import LAYERS, TOKENS, Fault

from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import Stage

COUNT, HEADS, KV_HEADS, WIDTH = len(TOKENS), 4, 2, 64
CAUSAL = np.tri(COUNT, dtype=bool)
Here = Mapping[Stage, np.ndarray]


def in_every_layer(stage: Stage, fault: Fault) -> dict[tuple[int, Stage], Fault]:
    return {(layer, stage): fault for layer in range(LAYERS)}


def scaled(factor: float) -> Fault:
    return lambda value, here: value * np.float32(factor)


def from_scores(probabilities: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """A softmax of scores `[position, head, key]`."""

    def fault(value: np.ndarray, here: Here) -> np.ndarray:
        scores = here[Stage.ATTN_SCORES].reshape(COUNT, HEADS, COUNT).astype(np.float64)
        return probabilities(scores).reshape(COUNT, -1)

    return fault


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    powers = np.exp(np.where(seen[:, None], scores - scores.max(axis=-1, keepdims=True), -np.inf))
    return powers / powers.sum(axis=-1, keepdims=True)


NO_MASK = from_scores(lambda scores: softmax(scores, np.ones_like(CAUSAL)))
LONG_MASK = from_scores(lambda scores: softmax(scores, np.tri(COUNT, k=1, dtype=bool)))
WINDOW_OF_FOUR = from_scores(lambda scores: softmax(scores, CAUSAL & ~np.tri(COUNT, k=-4, dtype=bool)))
COOLER = from_scores(lambda scores: softmax(scores * 0.9, CAUSAL))


def interleaved_keys(factor: float = 1.0) -> Fault:
    def fault(value: np.ndarray, here: Here) -> np.ndarray:
        q = here[Stage.Q_POST_ROPE].reshape(COUNT, HEADS, WIDTH).astype(np.float64)
        k = here[Stage.K_POST_ROPE].reshape(COUNT, KV_HEADS, WIDTH).astype(np.float64)
        scores = np.stack([q[:, head] @ k[:, head % KV_HEADS].T for head in range(HEADS)], axis=1)
        return (scores * factor / np.sqrt(WIDTH)).reshape(COUNT, -1)

    return fault


def stale_values(value: np.ndarray, here: Here) -> np.ndarray:
    """The cache's values lag by one position."""
    v = here[Stage.QKV_BIAS][:, -KV_HEADS * WIDTH :].reshape(COUNT, KV_HEADS, WIDTH)
    v = np.concatenate([v[:1], v[:-1]])
    p = here[Stage.ATTN_SOFTMAX].reshape(COUNT, HEADS, COUNT)
    return np.stack([p[:, head] @ v[:, head // 2] for head in range(HEADS)], axis=1).reshape(COUNT, -1)


def gelu(value: np.ndarray, here: Here) -> np.ndarray:
    gate = here[Stage.FFN_GATE].astype(np.float64)
    return gate * 0.5 * (1 + np.vectorize(erf)(gate / np.sqrt(2)))


def exchanged(value: np.ndarray, here: Here) -> np.ndarray:
    gate, up = here[Stage.FFN_GATE], here[Stage.FFN_UP]
    return up / (1 + np.exp(-up)) * gate


def added_twice(value: np.ndarray, here: Here) -> np.ndarray:
    return here[Stage.POST_ATTN_RESIDUAL] + 2 * here[Stage.FFN_OUT]


def nothing_added(value: np.ndarray, here: Here) -> np.ndarray:
    return here[Stage.FFN_OUT]


def without_v_bias(file: Checkpoint, layer: int) -> Fault:
    def fault(value: np.ndarray, here: Here) -> np.ndarray:
        value[:, -KV_HEADS * WIDTH :] -= file.tensors[f"model.layers.{layer}.self_attn.v_proj.bias"].decode()
        return value

    return fault


def mirrored(value: np.ndarray, here: Here) -> np.ndarray:
    """Nothing that anybody does."""
    return value[:, ::-1] * np.linspace(0.5, 2, value.shape[1]) ** 2
