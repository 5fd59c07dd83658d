"""The cases of the fault bench: every fault, at several layers, strengths and tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BIASES = tuple(f"self_attn.{p}_proj.bias" for p in "qkv")
ATTENTION = tuple(f"self_attn.{p}_proj.weight" for p in "qkvo")
Q, K, V, OUTPUT = ATTENTION
GATE, UP, DOWN = (f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
MATRICES = (*ATTENTION, GATE, UP, DOWN)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GLOBALS = (EMBEDDING, NORM, HEAD)

# The strengths: 0.1 %, 1 %, 10 % and twice.
FACTORS = (1.001, 1.01, 1.1, 2.0)
# By fault: the tensors of a layer, those outside the layers, and the strengths.
_ANY: tuple[float | None, ...] = (None,)
PLAN: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[float | None, ...]]] = {
    "transposed": ((Q, OUTPUT), (), _ANY),
    "dims-reversed": ((K, GATE, DOWN), (HEAD,), _ANY),
    "dims-misread": ((V, UP), (), _ANY),
    "rows-reversed": ((UP,), (HEAD,), _ANY),
    "columns-reversed": ((DOWN,), (), _ANY),
    "rows-permuted": ((GATE, V), (HEAD,), _ANY),
    "two-rows-exchanged": ((DOWN, BIASES[2]), (HEAD,), _ANY),
    "row-copied": ((GATE,), (EMBEDDING, HEAD), _ANY),
    "heads-permuted": ((Q, K, V, BIASES[0]), (), _ANY),
    "head-columns-permuted": ((OUTPUT,), (), _ANY),
    "rotary-interleaved": ((Q, K, BIASES[0]), (), _ANY),
    "rows-shifted": ((K, GATE, BIASES[1]), (EMBEDDING, HEAD), (1.0, -1.0, 3.0)),
    "row-inserted": ((DOWN,), (HEAD,), _ANY),
    "nibbles-interleaved": ((GATE, Q, V), (EMBEDDING,), _ANY),
    "nibbles-exchanged": ((UP,), (), _ANY),
    "high-bits-dropped": ((V, DOWN), (HEAD,), _ANY),
    "scale-bits-dropped": ((GATE, OUTPUT), (EMBEDDING,), _ANY),
    "minimum-lost": ((UP,), (), _ANY),
    "minimum-exchanged": ((GATE,), (), _ANY),
    "scaled": ((*NORMS, *BIASES, *MATRICES), GLOBALS, FACTORS),
    "scaled-encoded-again": ((OUTPUT, UP), (), (1.1, 2.0)),
    "head-scaled": ((Q, V), (), (0.5, 1.1)),
    "head-columns-scaled": ((OUTPUT,), (), _ANY),
    "norm-folded": ((GATE,), (), _ANY),
    "shifted": ((*NORMS, BIASES[1]), (NORM,), (0.1, 1.0)),
    "zeroed": ((*NORMS, *BIASES, *MATRICES), (NORM, HEAD), _ANY),
    "row-zeroed": ((GATE, K, BIASES[1]), (EMBEDDING, HEAD), _ANY),
    "type-misread": ((GATE, OUTPUT), (), _ANY),
    "double-quantized": ((UP, V), (HEAD,), _ANY),
    "bytes-shifted": ((GATE, DOWN), (), (32.0, 64.0)),
    "big-endian": ((NORMS[1], BIASES[0]), (), _ANY),
    "left-out": ((UP, BIASES[1]), (), _ANY),
    "shape-reversed": ((K, DOWN), (), _ANY),
    "control-noise": ((NORMS[0], GATE, BIASES[0]), (HEAD,), (0.5, 2.0)),
    # A vector that is scrambled is a permutation of its rows.
    "control-scrambled": ((Q, GATE), (HEAD,), _ANY),
    "nan": ((NORMS[1], UP, BIASES[2]), (NORM,), _ANY),
}
# Two tensors: by the first, the second.
PARTNERS = {(GATE, UP), (K, V), (BIASES[1], BIASES[2])}
CONFIG: dict[str, tuple[float, ...]] = {
    # A rope theta off by a hundredth is what a float16 passage leaves; the others are other models' values.
    "rope_theta": (1e4, 5e5, 1.01e6),
    "rms_norm_eps": (1e-5, 2e-6, 1e-9),
    "rope_type": (0.0,),
}


@dataclass(frozen=True)
class Case:
    """One fault of one model.

    Attributes:
        model: tiny, tiny-mha, 0.5b or 1.5b.
        group: file, computation, trace, clean or pair.
        fault: its id.
        layer: None for faults of the whole model or outside the layers.
        tensor: Hugging Face name, for faults of tensors.
        other: the second tensor's, for faults of two.
        strength: of the fault; None where it has only one.
        parts: of a pair: the two cases.
    """

    model: str
    group: str
    fault: str
    layer: int | None = None
    tensor: str | None = None
    other: str | None = None
    strength: float | None = None
    parts: tuple[Case, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from every other case."""
        if self.parts:
            return f"{self.model}/{self.group}/" + " + ".join(part.key.split("/", 2)[2] for part in self.parts)
        where = self.tensor or ("" if self.layer is None else f"layer {self.layer}")
        strength = "" if self.strength is None else f" {self.strength:g}"
        return f"{self.model}/{self.group}/{self.fault}{strength}" + (f" {where}" if where else "")

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "key": self.key}


def in_layer(layer: int, leaf: str) -> str:
    """A tensor's name."""
    return f"model.layers.{layer}.{leaf}"


def file_cases(model: str, layers: Sequence[int], *, few: bool = False) -> Iterator[Case]:
    """Faults of files: the full cross product; or, of large models, each fault once, its layers taken in turn."""
    turn = 0
    for fault, (leaves, outside, strengths) in PLAN.items():
        chosen = [(layer, in_layer(layer, leaf), s) for layer in layers for leaf in leaves for s in strengths]
        chosen += [(None, name, strength) for name in outside for strength in strengths]
        if few:
            # One at the first strength, and one at another tensor, layer and the last strength.
            chosen = [chosen[turn % len(chosen)], chosen[(turn + len(chosen) // 2 + 1) % len(chosen)]][: len(chosen)]
            turn += 3
        for layer, tensor, strength in dict.fromkeys(chosen):
            yield Case(model, "file", fault, layer, tensor, None, strength)
    for layer in layers[:1] if few else layers:
        for leaf, other in sorted(PARTNERS):
            yield Case(model, "file", "exchanged", layer, in_layer(layer, leaf), in_layer(layer, other))
    for first, second in pairwise(layers):
        for leaf in (DOWN, Q) if not few else (DOWN,):
            yield Case(model, "file", "exchanged", first, in_layer(first, leaf), in_layer(second, leaf))
        yield Case(model, "file", "other-name", first, in_layer(first, UP), in_layer(second, UP))
    for key, strengths in CONFIG.items():
        for strength in strengths[:1] if few else strengths:
            yield Case(model, "file", key.replace("_", "-"), strength=strength)


def mha_cases(layers: Sequence[int]) -> Iterator[Case]:
    """Exchanged q and k: only where there are as many key-value heads as heads."""
    for layer in layers:
        yield Case("tiny-mha", "file", "exchanged", layer, in_layer(layer, Q), in_layer(layer, K))
        yield Case("tiny-mha", "file", "exchanged", layer, in_layer(layer, BIASES[0]), in_layer(layer, BIASES[1]))
        yield Case("tiny-mha", "file", "transposed", layer, in_layer(layer, K))
