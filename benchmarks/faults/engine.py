"""A Qwen2 in NumPy that can compute wrongly: what saved traces with faults of the computation are made by.

It shares nothing with `aprjax.qwen2`: weights are read and decoded by gguf-py, sums are NumPy's, in float32. Every
stage is captured where `apr trace --save-tensor` captures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from codec import decode_bytes
from engine_parts import ACTIVATIONS, BRANCHES, PRODUCT_ROUNDINGS, SOFTMAXES, rounded_to

F = np.float32
Values = dict[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Twist:
    """One fault of an engine.

    Attributes:
        id: of `engine_faults.ENGINE_FAULTS`.
        layers: where it is made; None: in all.
        strength: its number, where it has one.
    """

    id: str
    layers: frozenset[int] | None = None
    strength: float | None = None


@dataclass
class Model:
    """A GGUF file's config and weights, decoded when asked for."""

    path: Path
    _reader: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = gguf.GGUFReader(self.path)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def number(self, key: str) -> Any:
        """A number of the metadata, without the architecture's name."""
        entry = self._reader.fields[f"qwen2.{key}"]
        return entry.parts[entry.data[0]][0].item()

    @cached_property
    def layers(self) -> int:
        """How many there are."""
        return int(self.number("block_count"))

    def weight(self, name: str) -> np.ndarray:
        """Decoded, `float32[out, in]`."""
        tensor = self.tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return decode_bytes(tensor.data.reshape(-1).view(np.uint8), tensor.tensor_type.name, shape)

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """All weights of a layer, by the end of their names (`attn_q.weight`)."""
        start = f"blk.{index}."
        return {name.removeprefix(start): self.weight(name) for name in self.tensors if name.startswith(start)}


class Engine:
    """One run, with its faults."""

    def __init__(self, model: Model, tokens: Sequence[int], twists: Sequence[Twist]) -> None:
        self.model, self.tokens, self.twists = model, list(tokens), tuple(twists)
        self.heads, self.kv_heads = (int(model.number(f"attention.head_count{end}")) for end in ("", "_kv"))
        self.hidden_size = int(model.number("embedding_length"))
        self.head_dim = self.hidden_size // self.heads
        self.values: Values = {}
        self.hidden = np.empty(0, F)

    def twist(self, name: str, layer: int = -1) -> Twist | None:
        """The fault of that id, where it is made."""
        for twist in self.twists:
            if twist.id == name and (twist.layers is None or layer in twist.layers):
                return twist
        return None

    def strength(self, name: str, layer: int, right: float) -> float:
        """A number of the computation: a fault's, or the right one."""
        twist = self.twist(name, layer)
        return right if twist is None or twist.strength is None else twist.strength

    def put(self, layer: int, stage: str, value: np.ndarray) -> np.ndarray:
        """Captures a value, times a fault's factor."""
        twist = self.twist(f"{stage}-scaled", layer)
        value = value.astype(F) * F(1 if twist is None else twist.strength or 1)
        self.values[layer, stage] = value.reshape(len(self.tokens), -1)
        return value

    def embed(self, table: np.ndarray) -> None:
        """The tokens' rows."""
        self.hidden = self.put(-1, "embedding", table[self.tokens])

    def norm(self, x: np.ndarray, weight: np.ndarray, layer: int) -> np.ndarray:
        """RMSNorm."""
        eps = F(self.strength("rms-eps", layer, self.model.number("attention.layer_norm_rms_epsilon")))
        if self.twist("layer-norm", layer):
            x = x - x.mean(axis=1, keepdims=True)
        if self.twist("norm-plus-one", layer):
            weight = weight + F(1)
        if self.twist("norm-weight-missing", layer):
            weight = np.ones_like(weight)
        square = np.square(x).mean(axis=1, keepdims=True)
        if self.twist("norm-missing", layer):
            return x * weight
        if self.twist("eps-outside", layer):
            return x / (np.sqrt(square) + eps) * weight
        return x / np.sqrt(square + eps) * weight

    def product(self, x: np.ndarray, weight: np.ndarray, layer: int) -> np.ndarray:
        """Activations times a matrix's rows."""
        for name, rounding in PRODUCT_ROUNDINGS.items():
            if self.twist(name, layer):
                x = rounding(x)
        return (x @ weight.T).astype(F)

    def rotate(self, x: np.ndarray, layer: int) -> np.ndarray:
        """`[position, head, channel]`, by position."""
        if self.twist("rope-missing", layer):
            return x
        half = self.head_dim // 2
        theta = self.strength("rope-theta", layer, self.model.number("rope.freq_base"))
        positions = np.arange(len(x)) + self.strength("position-offset", layer, 0.0)
        positions = positions * self.strength("rope-scaling", layer, 1.0)
        angle = positions[:, None] * theta ** (-np.arange(half) / half)
        if self.twist("rope-backwards", layer):
            angle = -angle
        cos, sin = (f(angle).astype(F)[:, None] for f in (np.cos, np.sin))
        out = np.empty_like(x)
        neighbours = self.twist("rope-pairing", layer) is not None
        first, second = (slice(0, None, 2), slice(1, None, 2)) if neighbours else (slice(0, half), slice(half, None))
        a, b = x[..., first], x[..., second]
        out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
        return out

    def run_layer(self, layer: int, w: Mapping[str, np.ndarray]) -> None:
        """One layer."""
        w = self.weights(layer, w)
        x, count = self.hidden, len(self.tokens)
        normed = self.put(layer, "attn_norm", self.norm(x, w["attn_norm.weight"], layer))
        parts = [self.product(normed, w[f"attn_{p}.weight"], layer) for p in "qkv"]
        self.put(layer, "qkv_matmul", np.concatenate(parts, axis=1))
        for index, p in enumerate("qkv"):
            factor = 1.0
            for name, wrong in (("bias-missing", 0.0), ("bias-doubled", 2.0)):
                if self.twist(name, layer) or self.twist(f"{name}-{p}", layer):
                    factor = wrong
            parts[index] = parts[index] + w[f"attn_{p}.bias"] * F(factor)
        q, k, v = np.split(
            self.put(layer, "qkv_bias", np.concatenate(parts, axis=1)),
            np.cumsum([part.shape[1] for part in parts[:-1]]),
            axis=1,
        )
        q, k, v = (part.reshape(count, -1, self.head_dim) for part in (q, k, v))
        q = self.put(layer, "q_post_rope", self.rotate(q, layer))
        k = self.put(layer, "k_post_rope", self.rotate(k, layer))
        attended = self.put(layer, "attention", self.attend(q, k, v, layer).reshape(count, -1))
        out = self.put(layer, "attn_out", self.product(attended, w["attn_output.weight"], layer))
        x = self.put(layer, "post_attn_residual", self.join("attention", x, normed, out, layer))
        normed = self.put(layer, "ffn_norm", self.norm(x, w["ffn_norm.weight"], layer))
        gate = self.put(layer, "ffn_gate", self.product(normed, w["ffn_gate.weight"], layer))
        up = self.put(layer, "ffn_up", self.product(normed, w["ffn_up.weight"], layer))
        act = next((f for name, f in ACTIVATIONS.items() if self.twist(name, layer)), ACTIVATIONS["silu"])
        silu = self.put(layer, "ffn_silu", act(gate))
        product = act(up) * gate if self.twist("gate-up-exchanged", layer) else silu * up
        product = self.put(layer, "ffn_swigl", product)
        out = self.put(layer, "ffn_out", self.product(product, w["ffn_down.weight"], layer))
        self.hidden = self.put(layer, "post_ffn_residual", self.join("ffn", x, normed, out, layer))

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int) -> np.ndarray:
        """Scores, softmax and weighted values, head by head."""
        count = len(q)
        if self.twist("kv-float16", layer):
            q, k, v = (rounded_to(part, "float16") for part in (q, k, v))
        if self.twist("kv-bfloat16", layer):
            k, v = (rounded_to(part, "bfloat16") for part in (k, v))
        group = self.heads // self.kv_heads
        read = np.arange(self.heads) // group
        if self.twist("kv-heads-interleaved", layer):
            read = np.arange(self.heads) % self.kv_heads
        if self.twist("kv-heads-first", layer):
            read = np.zeros_like(read)
        scale = self.head_dim**-0.5
        if self.twist("attn-scale-missing", layer):
            scale = 1.0
        if self.twist("attn-scale-twice", layer):
            scale = 1.0 / self.head_dim
        scale *= self.strength("attn-scale", layer, 1.0)
        scores = np.einsum("phd,khd->phk", q, k[:, read]) * F(scale)
        cap = self.twist("attn-softcap", layer)
        if cap is not None:
            scores = F(cap.strength or 1) * np.tanh(scores / F(cap.strength or 1))
        scores = self.put(layer, "attn_scores", scores)
        steps = np.arange(count)[:, None] - np.arange(count)[None]
        seen = steps >= (-1 if self.twist("mask-too-long", layer) else 0)
        if self.twist("mask-missing", layer):
            seen = np.ones_like(seen)
        window = self.twist("sliding-window", layer)
        if window is not None:
            seen &= steps < int(window.strength or 4)
        masked = np.where(seen[:, None], scores, F(-np.inf))
        softmax = next((f for name, f in SOFTMAXES.items() if self.twist(name, layer)), SOFTMAXES["softmax"])
        weights = self.put(layer, "attn_softmax", softmax(masked))
        if self.twist("kv-float16", layer):
            weights = rounded_to(weights, "float16")
        return np.einsum("phk,khd->phd", weights, v[:, read])

    def join(self, name: str, x: np.ndarray, normed: np.ndarray, out: np.ndarray, layer: int) -> np.ndarray:
        """Where a branch joins the residual stream."""
        skip, branch = 1.0, 1.0
        for end, factors in BRANCHES.items():
            if self.twist(f"{name}-{end}", layer):
                skip, branch = factors
        if self.twist(f"{name}-residual-from-norm", layer):
            x = normed
        return x * F(skip) + out * F(branch)

    def finish(self, norm: np.ndarray, head: np.ndarray, table: np.ndarray) -> None:
        """Final norm and head."""
        normed = self.put(-1, "final_norm", self.norm(self.hidden, norm, -1))
        if self.twist("head-tied"):
            head = table
        if self.twist("head-rows-shifted"):
            head = np.roll(head, 1, axis=0)
        self.put(-1, "lm_head", self.product(normed, head, -1))

    def weights(self, layer: int, w: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A layer's weights as the engine reads them."""
        from engine_weights import WEIGHT_TWISTS

        for twist in self.twists:
            change = WEIGHT_TWISTS.get(twist.id)
            if change is not None and (twist.layers is None or layer in twist.layers):
                w = {**w, **change(w, self.head_dim, twist.strength)}
        return w


def run_engines(model: Model, tokens: Sequence[int], faults: Sequence[tuple[Twist, ...]]) -> Iterator[Values]:
    """One run for each set of faults; every layer's weights are decoded once for all of them."""
    engines = [Engine(model, tokens, twists) for twists in faults]
    table = model.weight("token_embd.weight")
    for engine in engines:
        engine.embed(table)
    for index in range(model.layers):
        weights = model.layer(index)
        for engine in engines:
            with np.errstate(all="ignore"):
                engine.run_layer(index, weights)
    head = model.weight("output.weight") if "output.weight" in model.tensors else table
    norm = model.weight("output_norm.weight")
    for engine in engines:
        with np.errstate(all="ignore"):
            engine.finish(norm, head, table)
        yield engine.values
