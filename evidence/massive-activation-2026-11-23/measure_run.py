"""Runs the model's file under several activation quantizations, everything else in float64.

Every prompt, and every first token alone, is one sequence of a single batch: the mask lets a position see only
its own sequence, and positions count from zero in each. All matrices are those of one file, decoded; what varies is
how the activations that enter them are quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aprjax.bisect.metrics import distance
from aprjax.blocks.activations import QUANTIZERS, quantize_q8_0
from aprjax.checkpoint import Checkpoint
from aprjax.qwen2 import PRESETS, Arithmetic, Stage
from aprjax.qwen2.loading import embed, head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import bucket, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context
from aprjax.qwen2.rope import rope_tables
from aprjax.text import Tokenizer

# What upstream's audit of 2026-09-06 names (paiml/aprender docs/audits/l0-1b-arms.md).
LAYER, CHANNEL = 26, 408
PROMPT = "What is 2+2?"
# First tokens of other prompts: words, code, punctuation, digits, white space, other scripts.
FIRST = ("<|endoftext|>", "<|im_start|>", "What", "def", "Hello", "The", "import", "#", "\n", " ", "A", "1", "{")
FIRST += ("Once", "class", "from", "print", "I", "if", "return", "Write", "How", "//", "You", "(", "你", "Н")
# An activation counts as massive from here on: the other first tokens leave the channel below 30.
MASSIVE = 100.0
FLOAT64 = PRESETS["float64"]
ARITHMETICS = {
    "float64": FLOAT64,
    "per 256": replace(FLOAT64, name="per 256", matmul="integer-as-float", activations="per 256"),
    "per 32": replace(FLOAT64, name="per 32", matmul="integer-as-float", activations="per 32"),
}
KEPT = (
    Stage.POST_ATTN_RESIDUAL,
    Stage.ATTN_NORM,
    Stage.FFN_NORM,
    Stage.FFN_SWIGL,
    Stage.FFN_OUT,
    Stage.POST_FFN_RESIDUAL,
)
Layers = list[dict[Stage, np.ndarray]]
Through = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Sequences side by side; `sequence` and `position` say of every row what it belongs to."""

    names: tuple[str, ...]
    tokens: list[int]
    sequence: np.ndarray
    position: np.ndarray

    def rows(self, name: str) -> np.ndarray:
        """The rows of a sequence, its position 0 first."""
        return np.flatnonzero(self.sequence == self.names.index(name))

    def first(self, name: str) -> int:
        """The row of a sequence's position 0."""
        return int(self.rows(name)[0])


def make_batch(checkpoint: Checkpoint, texts: dict[str, str], first: tuple[str, ...]) -> Batch:
    """Whole prompts by name, and the first tokens of texts, each a sequence of its own, named by the text."""
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    sequences = {name: list(tokenizer.encode(text)) for name, text in texts.items()}
    sequences |= {text: list(tokenizer.encode(text))[:1] for text in first}
    return Batch(
        names=tuple(sequences),
        tokens=[token for ids in sequences.values() for token in ids],
        sequence=np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences.values()]),
        position=np.concatenate([np.arange(len(ids)) for ids in sequences.values()]),
    )


def context_of(checkpoint: Checkpoint, batch: Batch, length: int) -> Context:
    """Rotation tables and mask of the sequences, padded to `length` rows."""
    missing = (0, length - len(batch.tokens))
    sequence, position = np.pad(batch.sequence, missing, constant_values=-1), np.pad(batch.position, missing)
    config = checkpoint.config
    tables = rope_tables(
        position, theta=config.rope_theta, head_dim=config.head_dim, kind="closed-form", dtype="float64"
    )
    visible = (sequence[:, None] == sequence) & (position[:, None] >= position)
    return Context(*(jnp.asarray(table) for table in tables), jnp.asarray(visible))


def run(checkpoint: Checkpoint, batch: Batch, names: tuple[str, ...], *, layers: int) -> dict[str, Layers]:
    """Forward passes of the batch: per layer the kept stages, `float64[row, width]`.

    Besides every arithmetic of `names` on its own there are, where `LAYER` is reached, for each but float64 two runs
    that quantize nothing but the inputs of that layer's feed-forward matrices: of all rows, and of position 0.
    """
    count = len(batch.tokens)
    length = bucket(count)
    embedded = np.zeros((length, checkpoint.config.hidden_size))
    embedded[:count] = embed(checkpoint, batch.tokens)
    kept: dict[str, Layers] = {}
    with jax.enable_x64(True):
        context = context_of(checkpoint, batch, length)
        hidden = dict.fromkeys(names, embedded)
        for index in range(layers):
            layer = load_layer(checkpoint, index)
            values = {}
            for name in hidden:
                by = ARITHMETICS.get(name, FLOAT64)
                hidden[name], values[name] = _layer(layer, hidden[name], context, by, {})
            if index == LAYER:
                sites, outputs = _sites(
                    layer, context, values["float64"], names, np.pad(batch.position, (0, length - count))
                )
                values |= sites
                hidden |= outputs
            for name, stages in values.items():
                # What a site's run has in common with float64 before its layer is float64's.
                before = kept.setdefault(name, list(kept.get("float64", [])[:index]))
                before.append({stage: stages[stage][:count] for stage in KEPT})
    return kept


def _layer(
    layer: Any, hidden: np.ndarray, context: Context, arithmetic: Arithmetic, replaced: dict[Stage, np.ndarray]
) -> tuple[np.ndarray, dict[Stage, np.ndarray]]:
    given = {stage: jnp.asarray(value) for stage, value in replaced.items()}
    output, _, captured = run_layer(layer, jnp.asarray(hidden), context, given, {}, arithmetic=arithmetic, capture=True)
    return np.asarray(output), {stage: np.asarray(value) for stage, value in captured.items()}


def _sites(
    layer: Any, context: Context, exact: dict[Stage, np.ndarray], names: tuple[str, ...], position: np.ndarray
) -> tuple[dict[str, dict[Stage, np.ndarray]], dict[str, np.ndarray]]:
    """The feed-forward alone with quantized activations: its stages and the layer's output."""
    stages: dict[str, dict[Stage, np.ndarray]] = {}
    outputs: dict[str, np.ndarray] = {}
    before = {stage: exact[stage] for stage in (Stage.POST_ATTN_RESIDUAL, Stage.FFN_NORM)}
    for name in names:
        if name == "float64":
            continue
        output, captured = _layer(layer, exact[Stage.POST_ATTN_RESIDUAL], context, ARITHMETICS[name], before)
        captured |= before
        only = np.where(position[:, None] == 0, output, exact[Stage.POST_FFN_RESIDUAL])
        stages[f"{name}, this site"], outputs[f"{name}, this site"] = captured, output
        at_zero = {**captured, Stage.POST_FFN_RESIDUAL: only}
        stages[f"{name}, this site at position 0"], outputs[f"{name}, this site at position 0"] = at_zero, only
    return stages, outputs


def logits(checkpoint: Checkpoint, last: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """The logits of some rows of the last layer's output."""
    with jax.enable_x64(True):
        normed = run_norm(load_norm(checkpoint, "model.norm.weight"), jnp.asarray(last), arithmetic=arithmetic)
        return np.asarray(run_head(pack(head_tensor(checkpoint)), normed, arithmetic=arithmetic))


def _through(name: str) -> Through:
    """Blocks of one of ggml's types, decoded again."""

    def blocks(x: np.ndarray) -> np.ndarray:
        quantized = QUANTIZERS[name](x.astype(np.float32))
        return (quantized.codes.astype(float) * quantized.scale.astype(float)[..., None]).reshape(x.shape)

    return blocks


def _scale_not_rounded(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 whose scale is not rounded to float16: what Q8_0 and Q8_1 would be with a wider one."""
    codes = quantize_q8_0(x.astype(np.float32)).codes.astype(float)
    scale = np.abs(x.reshape(codes.shape)).max(axis=-1, keepdims=True) / 127
    return (codes * scale).reshape(x.shape)


def _channel_apart(x: np.ndarray) -> np.ndarray:
    """Blocks of 256 of all channels but one, which stays as it is."""
    rest = x.copy()
    rest[..., CHANNEL] = 0
    rest = _through("Q8_K")(rest)
    rest[..., CHANNEL] = x[..., CHANNEL]
    return rest


# What the inputs of gate and up, and those of down, go through.
QUANTIZED: dict[str, tuple[Through, Through]] = {
    **{name: (_through(name), _through(name)) for name in ("Q8_K", "Q8_0", "Q8_1")},
    "per 32, scale not rounded": (_scale_not_rounded, _scale_not_rounded),
    "Q8_K, channel 408 apart": (_channel_apart, _through("Q8_K")),
}


def feed_forward(checkpoint: Checkpoint, x: np.ndarray) -> dict[str, Any]:
    """One row's feed-forward block in NumPy: each quantization of its inputs against float64."""
    matrices = {
        name: checkpoint.tensors[f"model.layers.{LAYER}.mlp.{name}_proj.weight"].decode().astype(float)
        for name in ("gate", "up", "down")
    }

    def stages(outer: Through, inner: Through) -> dict[str, np.ndarray]:
        gate, up = matrices["gate"] @ outer(x), matrices["up"] @ outer(x)
        product = gate / (1 + np.exp(-gate)) * up
        return {"ffn_gate": gate, "ffn_up": up, "ffn_swigl": product, "ffn_out": matrices["down"] @ inner(product)}

    exact = stages(lambda value: value, lambda value: value)
    report: dict[str, Any] = {}
    for name, (outer, inner) in QUANTIZED.items():
        report[name] = {stage: errors(value, exact[stage]) for stage, value in stages(outer, inner).items()}
        down = matrices["down"] @ inner(exact["ffn_swigl"])
        report[name]["ffn_out from the exact ffn_swigl"] = errors(down, exact["ffn_out"])
    return report


def errors(value: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How far one row is off: as a whole, in its largest neuron, and in the worst of at least its rms."""
    large = np.flatnonzero(np.abs(exact) >= np.sqrt(np.mean(exact**2)))
    change = value[large] / exact[large] - 1
    worst, largest = int(np.abs(change).argmax()), int(np.abs(exact).argmax())
    whole = distance(value[None], exact[None])
    return {
        "rel_l2": whole.rel_l2,
        "cosine": whole.cosine,
        "largest": {"neuron": largest, "exact": exact[largest], "change": value[largest] / exact[largest] - 1},
        "worst": {"neuron": int(large[worst]), "exact": exact[large[worst]], "change": change[worst]},
        "neurons_of_at_least_the_rms": large.size,
    }
