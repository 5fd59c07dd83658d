"""Faults of a trace whose engine computed rightly: values taken elsewhere, of other rows, or in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from engine import Values
from engine_parts import rounded_to

Keys = tuple[tuple[int, str], ...]
# From the values of a right run, the layers that are hurt, and the width of a head: the values as they are dumped,
# and those that are not what their labels say.
Spoil = Callable[[Values, list[int], int], tuple[Values, Keys]]


@dataclass(frozen=True)
class TraceFault:
    """A kind of mistake.

    Attributes:
        id: its name.
        explained: ids of `aprjax.bisect.explain.identity` that are right.
        spoil: makes it.
        everywhere: it is one of the whole dump.
    """

    id: str
    explained: tuple[str, ...]
    spoil: Spoil
    everywhere: bool = False


def _each(stage: str, change: Callable[[Values, int, int], np.ndarray]) -> Spoil:
    """One stage of every chosen layer."""

    def spoil(values: Values, layers: list[int], head: int) -> tuple[Values, Keys]:
        changed = {(layer, stage): change(values, layer, head) for layer in layers}
        return {**values, **changed}, tuple(changed)

    return spoil


def _instead(stage: str, other: str) -> Spoil:
    return _each(stage, lambda values, layer, head: values[layer, other])


def _rows(stage: str, rows: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return _each(stage, lambda values, layer, head: rows(values[layer, stage]))


def _by_head(values: Values, layer: int, head: int) -> np.ndarray:
    rows = values[layer, "q_post_rope"]
    return rows.reshape(len(rows), -1, head).transpose(1, 0, 2).reshape(len(rows), -1)


def _trimmed(values: Values, layers: list[int], head: int) -> tuple[Values, Keys]:
    """llama.cpp keeps only the rows of the last layer that the head needs, from behind the attention on."""
    last = max(layer for layer, _ in values)
    stages = ("post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out")
    keys = tuple((last, stage) for stage in (*stages, "post_ffn_residual"))
    return {**values, **{key: values[key][-1:] for key in keys}}, keys


def _next_layers(values: Values, layers: list[int], head: int) -> tuple[Values, Keys]:
    """Every layer is numbered one too high, from 1 on."""
    last = max(layer for layer, _ in values)
    moved = {(layer + 1, stage): value for (layer, stage), value in values.items() if 0 <= layer < last}
    kept = {key: value for key, value in values.items() if key[0] < 0}
    return {**kept, **moved}, tuple(moved)


def _half(values: Values, layers: list[int], head: int) -> tuple[Values, Keys]:
    return {key: rounded_to(value, "float16") for key, value in values.items()}, tuple(values)


def _nan(values: Values, layers: list[int], head: int) -> tuple[Values, Keys]:
    key = (layers[0], "ffn_up")
    value = values[key].copy()
    value[len(value) // 2, 3] = np.nan
    return {**values, key: value}, (key,)


TRACE_FAULTS: dict[str, TraceFault] = {
    fault.id: fault
    for fault in (
        # The story: qkv before the bias on one side, after it on the other.
        TraceFault("captured-after-bias", ("capture-point",), _instead("qkv_matmul", "qkv_bias")),
        TraceFault("captured-before-bias", ("capture-point",), _instead("qkv_bias", "qkv_matmul")),
        TraceFault("captured-before-silu", ("capture-point",), _instead("ffn_silu", "ffn_gate")),
        TraceFault("captured-before-product", ("capture-point",), _instead("ffn_swigl", "ffn_silu")),
        TraceFault("captured-before-residual", ("capture-point",), _instead("post_attn_residual", "attn_out")),
        TraceFault("captured-before-second-residual", ("capture-point",), _instead("post_ffn_residual", "ffn_out")),
        TraceFault(
            "captured-before-scale",
            ("capture-point",),
            _each("attn_scores", lambda v, layer, head: v[layer, "attn_scores"] * np.float32(head**0.5)),
        ),
        TraceFault(
            "captured-before-rotation",
            ("capture-point",),
            _each("q_post_rope", lambda v, layer, h: v[layer, "qkv_bias"][:, : v[layer, "q_post_rope"].shape[1]]),
        ),
        # The story: the last token's values on one side, all tokens' on the other.
        TraceFault("last-token-only", ("token-selection",), _rows("ffn_swigl", lambda rows: rows[-1:])),
        TraceFault("first-token-only", ("token-selection",), _rows("ffn_out", lambda rows: rows[:1])),
        TraceFault("some-tokens", ("token-selection",), _rows("ffn_gate", lambda rows: rows[2:-1])),
        TraceFault("averaged", ("rows-averaged",), _rows("ffn_norm", lambda rows: rows.mean(axis=0, keepdims=True))),
        TraceFault("rows-reversed", ("rows-reordered",), _rows("ffn_up", lambda rows: rows[::-1])),
        TraceFault("rows-rolled", ("rows-reordered",), _rows("attn_norm", lambda rows: np.roll(rows, 1, axis=0))),
        TraceFault("heads-first", ("layout",), _each("q_post_rope", _by_head)),
        TraceFault(
            "padded",
            ("rows-padded",),
            _rows("ffn_out", lambda rows: np.concatenate([rows, np.zeros((5, rows.shape[1]), np.float32)])),
        ),
        TraceFault("last-layer-trimmed", ("rows-trimmed",), _trimmed, everywhere=True),
        TraceFault("layers-off-by-one", ("layer-shifted",), _next_layers, everywhere=True),
        TraceFault("dumped-in-float16", ("half-precision",), _half, everywhere=True),
        TraceFault("not-finite", ("not-finite",), _nan),
    )
}


def other_tokens(fault: str, tokens: tuple[int, ...], bos: int) -> tuple[int, ...]:
    """What was fed instead of the claimed tokens."""
    return {
        "bos-prepended": (bos, *tokens),
        "tokens-reversed": tokens[::-1],
        "token-replaced": (*tokens[:3], tokens[3] + 1, *tokens[4:]),
    }[fault]


# By fault: the ids that are right.
TOKEN_FAULTS: dict[str, tuple[str, ...]] = {
    "bos-prepended": ("bos-prepended", "tokens-shifted"),
    "tokens-reversed": ("tokens-reordered",),
    "token-replaced": ("tokens-differ",),
}
