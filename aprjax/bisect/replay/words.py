"""Which arithmetic explains a stage, in words: "ffn_gate: integer dots per 256"."""

from __future__ import annotations

from aprjax.bisect.cause import MATMUL_STAGES, tensors_of
from aprjax.bisect.replay.report import NodeReport
from aprjax.blocks import block_format
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor
from aprjax.qwen2.realizar import ACTIVATION_BLOCKS
from aprjax.qwen2.stages import Stage


def explained_in_words(
    nodes: tuple[NodeReport, ...], arithmetics: tuple[Arithmetic, ...], checkpoint: Checkpoint
) -> dict[str, str]:
    """By stage, in words, the arithmetic that explains it, where not all do."""
    by_name = {a.name: a for a in arithmetics}
    said: dict[str, dict[str, list[int]]] = {}
    for node in nodes:
        if not node.verdict.explained or len(node.explained_by) == len(arithmetics):
            continue
        words = in_words(by_name[node.arithmetic], node.layer, node.stage, checkpoint)
        said.setdefault(str(node.stage), {}).setdefault(words, []).append(node.layer)
    order = [str(stage) for stage in Stage]
    return {
        stage: " and ".join(
            words if len(said[stage]) == 1 else f"{words} (layers {_layers(where)})"
            for words, where in said[stage].items()
        )
        for stage in sorted(said, key=order.index)
    }


def _layers(layers: list[int]) -> str:
    """`0-3, 7`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def in_words(arithmetic: Arithmetic, layer: int, stage: Stage, checkpoint: Checkpoint) -> str:
    """What an arithmetic does at a stage: "integer dots per 256", "float activations", or its name."""
    if stage not in MATMUL_STAGES:
        return f"as in {arithmetic.name}"
    tensors = [checkpoint.tensors.get(n) or head_tensor(checkpoint) for n in tensors_of(layer, stage)]
    kind = "integer dots" if arithmetic.matmul == "integer" else "quantized activations"
    sizes = dict.fromkeys(_activation_block(arithmetic, tensor) for tensor in tensors)
    return " and ".join("float activations" if size is None else f"{kind} per {size}" for size in sizes)


def _activation_block(arithmetic: Arithmetic, tensor: EncodedTensor) -> int | None:
    """How many activations share a scale where this weight is multiplied; None where they stay floats."""
    activation = block_format(tensor.block_type).activation
    if activation is None or arithmetic.matmul == "dequantize":
        return None
    if arithmetic.activations == "realizar":
        return ACTIVATION_BLOCKS.get(tensor.block_type)
    if arithmetic.activations == "engine":
        return block_format(activation).block_size
    return 256 if arithmetic.activations == "per 256" and tensor.shape[1] % 256 == 0 else 32
