"""The points of the graph where a value may have been taken, as a file has them: named ones, and those between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.lockstep import Runner, Values
from aprjax.bisect.replay.layers import BY_KEY
from aprjax.checkpoint.types import Checkpoint, ModelConfig
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import embed_padded, precision_scope, run_head, run_norm, trim
from aprjax.qwen2.stages import OUTSIDE, Stage


@dataclass(frozen=True)
class Point:
    """A place in the graph: a stage, or what lies just before one.

    Attributes:
        layer: -1 outside the layers.
        stage: the stage, or the one that it lies before.
        variant: which place before it, in words; empty for the stage itself.
    """

    layer: int
    stage: Stage
    variant: str = ""

    def words(self, layer: int, stage: Stage) -> str:
        """In words, seen from a value that is labelled as a stage of a layer."""
        if self.variant:
            name = str(self.stage) if self.stage is not stage else "its value"
            text = f"{name} {self.variant}"
        else:
            text = str(self.stage)
        return text if self.layer in (layer, OUTSIDE) else f"{text} of the layer {way(self.layer - layer)}"


def way(steps: int) -> str:
    """`before`, `after`, `2 after`: from one layer to another."""
    return "before" if steps == -1 else "after" if steps == 1 else f"{abs(steps)} {'after' if steps > 0 else 'before'}"


def run_file(
    checkpoint: Checkpoint, tokens: tuple[int, ...], arithmetic: Arithmetic, *, layers: int, head: bool
) -> Iterator[tuple[int, Values]]:
    """Yields the embedding, each of the first `layers` layers, and the head's stages if asked: the file's own values.

    Every value is `float[position, width]`; the stages outside the layers come under -1, the head's last.
    """
    runner, count = Runner(checkpoint, arithmetic), len(tokens)
    hidden = embed_padded(checkpoint, list(tokens), arithmetic)
    yield OUTSIDE, {Stage.EMBEDDING: hidden[:count]}
    context = runner.context(len(hidden))
    for layer in range(layers):
        hidden, captured = runner.run(load_layer(checkpoint, layer), hidden, context)
        yield layer, {stage: trim(stage, value, count) for stage, value in captured.items()}
    if head:
        with precision_scope(arithmetic):
            norm = load_norm(checkpoint, "model.norm.weight")
            normed = run_norm(norm, jnp.asarray(hidden[:count]), arithmetic=arithmetic)
            logits = run_head(pack(head_tensor(checkpoint)), normed, arithmetic=arithmetic)
            yield OUTSIDE, {Stage.FINAL_NORM: np.asarray(normed), Stage.LM_HEAD: np.asarray(logits)}


def points_of(layer: int, values: Values, checkpoint: Checkpoint) -> dict[Point, np.ndarray]:
    """A layer's stages, and the places between them that they are mistaken for; `float32[position, width]` each."""
    config = checkpoint.config
    points = {Point(layer, stage): np.asarray(value, np.float32) for stage, value in values.items()}
    for stage, name in _NORMS.items():
        if stage in values:
            weight = checkpoint.tensors[name.format(layer)].decode()
            bare = np.divide(values[stage], weight, out=np.zeros_like(values[stage]), where=weight != 0)
            points[Point(layer, stage, "before the weight")] = bare
    if Stage.QKV_BIAS in values:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        cut = {Stage.Q_POST_ROPE: slice(0, queries), Stage.K_POST_ROPE: slice(queries, queries + keys)}
        for stage, part in cut.items():
            points[Point(layer, stage, "before the rotation")] = values[Stage.QKV_BIAS][:, part]
            points[Point(layer, stage, "before rotation and bias")] = values[Stage.QKV_MATMUL][:, part]
    if Stage.ATTN_SCORES in values:
        scores = values[Stage.ATTN_SCORES]
        points[Point(layer, Stage.ATTN_SCORES, "before the scale")] = scores * np.float32(config.head_dim**0.5)
    return points


_NORMS = {
    Stage.ATTN_NORM: "model.layers.{}.input_layernorm.weight",
    Stage.FFN_NORM: "model.layers.{}.post_attention_layernorm.weight",
    Stage.FINAL_NORM: "model.norm.weight",
}


def layouts(
    flat: np.ndarray, stage: Stage, count: int, config: ModelConfig, *, by_heads: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """The orders in which a stage's numbers may lie, as `[position, width]`; the plain one comes without words.

    Args:
        flat: float32, as many as `count` positions have.
        stage: whose numbers they are claimed to be.
        count: positions.
        config: heads and their width.
        by_heads: whether the plain order is head by head rather than position by position.
    """
    for words, value in _orders(flat, stage, count, config):
        plain = words.startswith("as [head, query, key]") or words.startswith("as [head, position, channel]")
        if by_heads and plain:
            yield "", value
        elif by_heads and not words:
            yield "position by position, not head by head", value
        else:
            yield words, value


def _orders(flat: np.ndarray, stage: Stage, count: int, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    yield "", flat.reshape(count, -1)
    heads = {
        Stage.Q_POST_ROPE: config.num_heads,
        Stage.K_POST_ROPE: config.num_kv_heads,
        Stage.ATTENTION: config.num_heads,
        Stage.ATTN_SCORES: config.num_heads,
        Stage.ATTN_SOFTMAX: config.num_heads,
    }.get(stage)
    if stage in BY_KEY:
        grid = (config.num_heads, count, count)
        yield "as [head, query, key]", _rows(flat.reshape(grid).transpose(1, 0, 2))
        yield "as [head, key, query]", _rows(flat.reshape(grid).transpose(2, 0, 1))
        yield "as [key, head, query]", _rows(flat.reshape(count, -1, count).transpose(2, 1, 0))
        yield "as [query, key, head]", _rows(flat.reshape(count, count, -1).transpose(0, 2, 1))
        return
    if count > 1:
        if heads is not None:
            yield "as [head, position, channel]", _rows(flat.reshape(heads, count, -1).transpose(1, 0, 2))
            yield "as [position, channel, head]", _rows(flat.reshape(count, -1, heads).transpose(0, 2, 1))
        yield "as [width, position]", np.ascontiguousarray(flat.reshape(-1, count).T)
    if stage in (Stage.QKV_MATMUL, Stage.QKV_BIAS):
        yield from _qkv_orders(flat, count, config)


def _qkv_orders(flat: np.ndarray, count: int, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = {"q": queries, "k": keys, "v": keys}
    rows = flat.reshape(count, -1)
    for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
        ends = np.cumsum([widths[name] for name in order])
        parts = dict(zip(order, np.split(rows, ends[:-1], axis=1), strict=True))
        yield f"in the order {', '.join(order)}", np.concatenate([parts[name] for name in "qkv"], axis=1)
    if count > 1:
        # One array after the other, each with all its positions.
        ends = np.cumsum([widths[name] * count for name in "qkv"])
        blocks = [part.reshape(count, -1) for part in np.split(flat, ends[:-1])]
        yield "as all of q, then all of k, then all of v", np.concatenate(blocks, axis=1)


def _rows(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(value.shape[0], -1)
