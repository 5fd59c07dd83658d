"""Weights that an engine reads wrongly from a right file, as decoded arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]
Change = Callable[[Weights, int, float | None], dict[str, np.ndarray]]


def _one(name: str, change: Callable[[np.ndarray, int, float], np.ndarray]) -> Change:
    return lambda w, head, strength: {name: change(w[name], head, 1.0 if strength is None else strength)}


def _exchanged(first: str, second: str) -> Change:
    return lambda w, head, strength: {first: w[second], second: w[first]}


def _heads(w: np.ndarray, head: int, _: float) -> np.ndarray:
    order = np.arange(len(w) // head)
    order[[0, 1]] = [1, 0]
    return w.reshape(-1, head, w.shape[1])[order].reshape(w.shape)


def _rotary(w: np.ndarray, head: int, _: float) -> np.ndarray:
    return w.reshape(-1, 2, head // 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)


def _some_zero(w: np.ndarray, head: int, _: float) -> np.ndarray:
    w = w.copy()
    w[:head] = 0
    return w


WEIGHT_TWISTS: dict[str, Change] = {
    "weights-o-transposed": _one("attn_output.weight", lambda w, head, s: w.T),
    "weights-gate-up-exchanged": _exchanged("ffn_gate.weight", "ffn_up.weight"),
    "weights-k-v-exchanged": _exchanged("attn_k.weight", "attn_v.weight"),
    "weights-norms-exchanged": _exchanged("attn_norm.weight", "ffn_norm.weight"),
    "weights-down-scaled": _one("ffn_down.weight", lambda w, head, s: w * np.float32(s)),
    "weights-gate-rows-shifted": _one("ffn_gate.weight", lambda w, head, s: np.roll(w, 1, axis=0)),
    "weights-up-rows-reversed": _one("ffn_up.weight", lambda w, head, s: w[::-1]),
    "weights-q-heads-permuted": _one("attn_q.weight", _heads),
    "weights-q-rotary": _one("attn_q.weight", _rotary),
    "weights-q-head-zero": _one("attn_q.weight", _some_zero),
    "weights-down-zero": _one("ffn_down.weight", lambda w, head, s: np.zeros_like(w)),
    "weights-gate-dims": _one("ffn_gate.weight", lambda w, head, s: w.T.reshape(w.shape)),
}
