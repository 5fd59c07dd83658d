"""Two arithmetics taken apart: the choices in which they differ, each in words, and each switched alone.

"llama.cpp and float32 compute this differently" is no cause: they differ in six ways. Which of them matters is found by
switching one of them in the reference's arithmetic and looking at what that alone does (`locate`, `attribute`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jaxtyping import Float

from aprjax.bisect.cause import MATMUL_STAGES, Accusation, tensors_of
from aprjax.bisect.confidence import Confidence
from aprjax.bisect.locate.report import place
from aprjax.blocks import block_format
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.kernels import activation_block
from aprjax.qwen2.loading import head_tensor
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, STAGE_INPUTS, Stage

_NORMS = frozenset({Stage.ATTN_NORM, Stage.FFN_NORM, Stage.FINAL_NORM})
_ROTATED = frozenset({Stage.Q_POST_ROPE, Stage.K_POST_ROPE})
_ATTENTION = frozenset({Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX, Stage.ATTENTION})
_EVERYWHERE = frozenset({*LAYER_STAGES, Stage.FINAL_NORM, Stage.LM_HEAD})


class ArithmeticSide(Protocol):
    """Whatever has a file, perhaps, and an arithmetic: a `Runner` or a `Traced`."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The file; None where it is not at hand."""
        ...

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        ...


@dataclass(frozen=True)
class Choice:
    """One thing that an engine may choose, and where it shows.

    Attributes:
        name: in a word or two.
        fields: of `Arithmetic`.
        stages: that it acts at.
        words: what an arithmetic does, given the block types of the matrices in question (none where there are none).
    """

    name: str
    fields: tuple[str, ...]
    stages: frozenset[Stage]
    words: Callable[[Arithmetic, tuple[EncodedTensor, ...]], str]

    def differs(self, one: Arithmetic, other: Arithmetic) -> bool:
        """Whether the two choose otherwise."""
        return any(getattr(one, name) != getattr(other, name) for name in self.fields)

    def put_into(self, arithmetic: Arithmetic, other: Arithmetic) -> Arithmetic:
        """`arithmetic` with the other's choice in this one thing."""
        return replace(
            arithmetic,
            name=f"{arithmetic.name} with {other.name}'s {self.name}",
            **{name: getattr(other, name) for name in self.fields},
        )


def _activations(arithmetic: Arithmetic, matrices: tuple[EncodedTensor, ...]) -> str:
    """What quantizes the activations that these matrices are multiplied by: "quantized per 256 (Q8_K)"."""
    found: dict[str, None] = {}
    for tensor in matrices:
        found[_blocks(activation_block(tensor.block_type, tensor.shape[-1], arithmetic))] = None
    if list(found) == [""] or arithmetic.matmul == "dequantize":
        return "activations not quantized"
    return f"activations quantized {', '.join(words or 'not at all' for words in found)}"


def _blocks(partner: str | int | None) -> str:
    if partner is None:
        return ""
    if isinstance(partner, int):
        return f"per {partner} (realizar's blocks)"
    return f"per {block_format(partner).block_size} ({partner})"


def _plain(name: str, field: str, words: dict[str, str] | None = None) -> Callable[[Arithmetic, object], str]:
    def say(arithmetic: Arithmetic, matrices: object) -> str:
        chosen = str(getattr(arithmetic, field))
        return (words or {}).get(chosen, f"{name} {chosen}")

    return say


def _cache(arithmetic: Arithmetic, matrices: object) -> str:
    if arithmetic.attention == "flash":
        return "flash attention over a float16 cache"
    return "keys and values in float16" if arithmetic.kv_cache == "float16" else "keys and values not rounded"


def _sums(arithmetic: Arithmetic, matrices: object) -> str:
    kernels = f", kernels {', '.join(arithmetic.kernels)}" if arithmetic.kernels else ""
    return (
        f"sums in the engine's own order ({arithmetic.vectors}{kernels})" if arithmetic.exact else "sums re-associated"
    )


# In the order in which they usually matter. The words are for reports; `qwen2.arithmetic` has the definitions.
CHOICES: tuple[Choice, ...] = (
    Choice("activations", ("matmul", "activations"), MATMUL_STAGES, _activations),
    Choice("cache", ("kv_cache", "attention"), _ATTENTION, _cache),
    Choice("rope", ("rope",), _ROTATED, _plain("rotary angles", "rope")),
    Choice("rotation", ("rotation",), _ROTATED, _plain("rotary products", "rotation")),
    Choice("norm", ("norm",), _NORMS, _plain("RMSNorm's squares summed as", "norm")),
    Choice("softmax", ("softmax",), frozenset({Stage.ATTN_SOFTMAX}), _plain("softmax summed as", "softmax")),
    Choice(
        "exponential",
        ("exponential",),
        frozenset({Stage.ATTN_SOFTMAX, Stage.FFN_SILU, Stage.FFN_SWIGL}),
        _plain(
            "exponential",
            "exponential",
            {"library": "the library's exponential", "polynomial": "ggml's polynomial exponential"},
        ),
    ),
    Choice("order of sums", ("exact", "kernels", "vectors"), _EVERYWHERE, _sums),
    Choice("float type", ("dtype",), _EVERYWHERE, _plain("floats in", "dtype")),
)


def differing_choices(one: Arithmetic, other: Arithmetic, stage: Stage | None = None) -> tuple[Choice, ...]:
    """The choices in which two arithmetics differ; of a stage, those that act at it."""
    return tuple(
        choice for choice in CHOICES if choice.differs(one, other) and (stage is None or stage in choice.stages)
    )


def matrices_of(checkpoint: Checkpoint | None, layer: int, stage: Stage) -> tuple[EncodedTensor, ...]:
    """The matrices that a stage multiplies by; none where it multiplies by none, or the file is not at hand."""
    if checkpoint is None or stage not in MATMUL_STAGES:
        return ()
    if stage is Stage.LM_HEAD:
        return (head_tensor(checkpoint),)
    found = (checkpoint.tensors.get(name) for name in tensors_of(layer, stage))
    return tuple(tensor for tensor in found if tensor is not None)


def told_apart(layer: int, stage: Stage, model: ArithmeticSide, ref: ArithmeticSide) -> tuple[Choice, ...]:
    """The choices that make two sides compute a stage differently; none where they only round differently.

    Activations count by what they are really quantized to: of a float weight they are not, whatever the arithmetic, and
    one arithmetic quantizes them otherwise for another block type.
    """
    matrices = [matrices_of(side.checkpoint or model.checkpoint, layer, stage) for side in (model, ref)]
    found = [
        choice
        for choice in CHOICES
        if stage in choice.stages
        and (
            choice.words(model.arithmetic, matrices[0]) != choice.words(ref.arithmetic, matrices[1])
            if choice.name == "activations"
            else choice.differs(model.arithmetic, ref.arithmetic)
        )
    ]
    # The order of sums only rounds: beside anything else it is not what is looked for.
    return tuple(choice for choice in found if choice.name != "order of sums") or tuple(found)


def words_of(choices: Iterable[Choice], side: ArithmeticSide, places: Iterable[tuple[int, Stage]]) -> str:
    """What a side does at these places, in words."""
    matrices = tuple(tensor for place in places for tensor in matrices_of(side.checkpoint, *place))
    return " and ".join(choice.words(side.arithmetic, matrices) for choice in choices)


def accuse_choices(
    choices: tuple[Choice, ...],
    model: ArithmeticSide,
    ref: ArithmeticSide,
    places: Sequence[tuple[int, Stage]],
    confidence: Confidence,
    *,
    loud: Loud | None = None,
) -> Accusation:
    """Choices as the cause, with the place (the first of `places`) to mend first.

    `loud` is the activation there whose block suffers most, if quantizing does it.
    """
    ours, theirs = words_of(choices, model, places), words_of(choices, ref, places)
    where = place(*places[0])
    cause = f"{ours} in the model ({model.arithmetic.name}), {theirs} in the reference ({ref.arithmetic.name})"
    step = f"give both engines one choice, at {where} first: {theirs}, or {ours}"
    if loud is not None:
        cause = f"{cause}; at {where} {loud.sentence()}"
        step = f"{step}; smaller blocks, or none, spare the neighbours"
    return Accusation(cause, step, confidence)


def input_block(
    choices: tuple[Choice, ...], side: ArithmeticSide, layer: int, stage: Stage
) -> tuple[Stage, int] | None:
    """The stage whose value is quantized on its way into this one, and the block's size; None where nothing is."""
    matrices = matrices_of(side.checkpoint, layer, stage)
    if not matrices or layer == OUTSIDE or all(choice.name != "activations" for choice in choices):
        return None
    block = activation_block(matrices[0].block_type, matrices[0].shape[-1], side.arithmetic)
    if block is None:
        return None
    return Stage(STAGE_INPUTS[stage][0]), block if isinstance(block, int) else block_format(block).block_size


@dataclass(frozen=True)
class Loud:
    """An activation so much larger than its neighbours that quantizing its block makes most of them zero.

    Attributes:
        position, channel: its place.
        value: of it.
        size: of the block.
        zeroed: the share of the block's other values that become zero.
    """

    position: int
    channel: int
    value: float
    size: int
    zeroed: float

    def sentence(self) -> str:
        """In words, without a full stop."""
        return (
            f"channel {self.channel} at position {self.position} ({self.value:.4g}) sets the step of its block of "
            f"{self.size}, in which {self.zeroed:.0%} of the other values become zero"
        )


def loudest(values: Float[np.ndarray, "position width"], size: int) -> Loud | None:
    """The activation that costs its block most; None where every block's step is below the rms of the others in it."""
    if values.shape[1] % size:
        return None
    blocks = np.abs(values.astype(np.float64)).reshape(len(values), -1, size)
    largest = blocks.max(axis=2)
    others = np.sqrt(np.maximum(np.square(blocks).sum(axis=2) - np.square(largest), 0) / (size - 1))
    # ggml's quantizers have 127 steps to the largest value (`quantize_row_q8_K`).
    step = largest / 127
    cost = np.divide(step, others, out=np.zeros_like(step), where=others > 0)
    row, block = np.unravel_index(int(cost.argmax()), cost.shape)
    if cost[row, block] < 1:
        return None
    channel = int(block) * size + int(blocks[row, block].argmax())
    zeroed = float((blocks[row, block] < step[row, block] / 2).sum() / (size - 1))
    return Loud(int(row), channel, float(values[row, channel]), size, zeroed)
