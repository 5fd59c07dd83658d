"""`Qwen2`: embedding, layers, final norm and head, run layer by layer.

One layer is the unit of compilation: `run_layer` is jitted with the weights as arguments, so that all
layers of one block-type mix share one program. `Qwen2.__call__` composes the same functions into an
ordinary pure function of (parameters, tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float

from aprjax.checkpoint.types import Checkpoint, ModelConfig
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.loading import embed, head_tensor, load_layer, load_norm, pack, require_runnable
from aprjax.qwen2.modules import Context, DecoderLayer, PackedWeight, RMSNorm, multiply
from aprjax.qwen2.rope import rope_tables
from aprjax.qwen2.sharding import current_mesh, replicated, use_mesh
from aprjax.qwen2.stages import OUTSIDE, Stage, Tap


@contextmanager
def precision_scope(arithmetic: Arithmetic) -> Iterator[None]:
    """Allows float64 inside the block where the arithmetic needs it; there is no global switch."""
    if arithmetic.dtype == "float64":
        with jax.enable_x64(True):
            yield
    else:
        yield


@partial(jax.jit, static_argnames=("arithmetic", "capture"))
def run_layer(
    layer: DecoderLayer,
    hidden: Float[Array, "position hidden"],
    context: Context,
    replacements: dict[Stage, Array],
    perturbations: dict[Stage, Array],
    *,
    arithmetic: Arithmetic,
    capture: bool,
) -> tuple[Float[Array, "position hidden"], tuple[Array, Array], dict[Stage, Array]]:
    """One layer: its output, its keys and values, and (if `capture`) every stage as computed."""
    tap = Tap(capture=capture, replace=replacements, perturb=perturbations)
    output, cache = layer(hidden.astype(arithmetic.dtype), context, arithmetic, tap)
    # Over several hosts only what is whole on each can be read.
    output, captured = replicated((output, tap.captured), layer.self_attn.q_proj.weight.mesh)
    return output, cache, captured


def run_norm(norm: RMSNorm, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    """The final norm."""
    return _in_bucket(_norm, norm, hidden, arithmetic)


def run_head(head: PackedWeight, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    """Logits `[position, vocab]`."""
    return _in_bucket(_head, head, hidden, arithmetic)


def _in_bucket(run: Callable[..., Array], weights: Any, hidden: Any, arithmetic: Arithmetic) -> Array:
    """Runs rows of zeros along, so that near numbers of positions share a program; one position runs alone."""
    count = hidden.shape[0]
    padded = count if count == 1 or isinstance(hidden, Tracer) else bucket(count, arithmetic)
    if padded == count:
        return run(weights, hidden, arithmetic=arithmetic)
    return run(weights, jnp.pad(hidden, ((0, padded - count), (0, 0))), arithmetic=arithmetic)[:count]


@partial(jax.jit, static_argnames=("arithmetic",))
def _norm(norm: RMSNorm, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    with jax.named_scope(Stage.FINAL_NORM):
        return norm(hidden.astype(arithmetic.dtype), arithmetic)


@partial(jax.jit, static_argnames=("arithmetic",))
def _head(head: PackedWeight, hidden: Float[Array, "position hidden"], *, arithmetic: Arithmetic) -> Array:
    with jax.named_scope(Stage.LM_HEAD):
        return multiply(head, hidden.astype(arithmetic.dtype), arithmetic)


def bucket(length: int, *arithmetics: Arithmetic) -> int:
    """The padded length that prompts of `length` tokens share, so that near lengths don't recompile.

    Powers of two up to 64, then multiples of 64: never more than a third is padding beyond 128 tokens. No
    padding where one of the arithmetics depends on the batch.
    """
    if any(arithmetic.depends_on_batch for arithmetic in arithmetics):
        return length
    if length <= 64:
        return max(8, 1 << (length - 1).bit_length())
    return -(-length // 64) * 64


def causal_context(config: ModelConfig, arithmetic: Arithmetic, *, length: int, start: int = 0) -> Context:
    """Positions `start … start + length - 1`, each seeing itself and those before it."""
    with precision_scope(arithmetic):
        cos, sin = rope_tables(
            np.arange(start, start + length),
            theta=config.rope_theta,
            head_dim=config.head_dim,
            kind=arithmetic.rope,
            dtype=arithmetic.dtype,
        )
        return Context(jnp.asarray(cos), jnp.asarray(sin), jnp.tril(jnp.ones((length, length), bool)))


def embed_padded(checkpoint: Checkpoint, tokens: list[int], *arithmetics: Arithmetic) -> np.ndarray:
    """The embedding rows, with rows of zeros after them up to the bucket's length.

    Causality keeps the padding out of every real position. Zeros are safe: RMSNorm of zeros is zero.
    """
    rows = embed(checkpoint, tokens)
    padded = np.zeros((bucket(len(tokens), *arithmetics), rows.shape[1]), np.float32)
    padded[: len(tokens)] = rows
    return padded


@partial(jax.tree_util.register_dataclass, data_fields=["embedding", "layers", "norm", "head"], meta_fields=[])
@dataclass(frozen=True)
class Parameters:
    """A whole model as one pytree, for `logits` under an outer `jax.jit` or `jax.grad`.

    `embedding` holds the rows of the tokens at hand, `[position, hidden]`: the embedding matrix itself
    stays in the file.
    """

    embedding: Float[Array, "position hidden"]
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: PackedWeight


def logits(
    parameters: Parameters,
    context: Context,
    perturbations: dict[tuple[int, Stage], Array] | None = None,
    *,
    arithmetic: Arithmetic,
) -> Float[Array, "position vocab"]:
    """The forward pass as one pure function, differentiable in every float leaf and perturbation.

    `perturbations` are added at their (layer, stage); the gradient with respect to zeros there is the
    gradient with respect to that stage's value.
    """
    added = perturbations or {}
    hidden = parameters.embedding.astype(arithmetic.dtype)
    if (OUTSIDE, Stage.EMBEDDING) in added:
        hidden = hidden + added[OUTSIDE, Stage.EMBEDDING]
    for index, layer in enumerate(parameters.layers):
        here = {stage: value for (at, stage), value in added.items() if at == index}
        hidden, _, _ = run_layer(layer, hidden, context, {}, here, arithmetic=arithmetic, capture=False)
    normed = run_norm(parameters.norm, hidden, arithmetic=arithmetic)
    if (OUTSIDE, Stage.FINAL_NORM) in added:
        normed = normed + added[OUTSIDE, Stage.FINAL_NORM]
    return run_head(parameters.head, normed, arithmetic=arithmetic)


@dataclass
class Qwen2:
    """A loaded model: every weight encoded, on the default device.

    Attributes:
        checkpoint: where the weights come from.
        arithmetic: how it computes.
        mesh: the devices that its weights are split over (`sharding.device_mesh`), or how many of them; by default
            those of the `sharding.use_mesh` that it is made in, else one device.
    """

    checkpoint: Checkpoint
    arithmetic: Arithmetic = PRESETS["float32"]
    mesh: Mesh | int | None = None
    layers: list[DecoderLayer] = field(init=False, repr=False)
    norm: RMSNorm = field(init=False, repr=False)
    head: PackedWeight = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_runnable(self.checkpoint)
        with use_mesh(current_mesh() if self.mesh is None else self.mesh):
            self.layers = [load_layer(self.checkpoint, index) for index in range(self.config.num_layers)]
            self.norm = load_norm(self.checkpoint, "model.norm.weight")
            self.head = pack(head_tensor(self.checkpoint))

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's dimensions and constants."""
        return self.checkpoint.config

    def parameters(self, tokens: list[int]) -> Parameters:
        """The model as one pytree, with the embedding rows of `tokens`."""
        rows = jnp.asarray(embed(self.checkpoint, tokens))
        return Parameters(rows, tuple(self.layers), self.norm, self.head)

    def __call__(self, tokens: list[int] | np.ndarray) -> Float[Array, "position vocab"]:
        """Logits of every position."""
        return self.forward(list(tokens), capture=False)[0]

    def run_with_cache(self, tokens: list[int]) -> tuple[Array, dict[tuple[int, Stage], Array]]:
        """Logits, and every stage's value by (layer, stage); layer -1 holds the stages outside the layers."""
        return self.forward(tokens, capture=True)

    def forward(self, tokens: list[int], *, capture: bool) -> tuple[Array, dict[tuple[int, Stage], Array]]:
        """Runs layer by layer; see `run_with_cache`."""
        arithmetic, count = self.arithmetic, len(tokens)
        trace: dict[tuple[int, Stage], Array] = {}
        with precision_scope(arithmetic):
            hidden = jnp.asarray(embed_padded(self.checkpoint, tokens, arithmetic)).astype(arithmetic.dtype)
            trace[OUTSIDE, Stage.EMBEDDING] = hidden[:count]
            context = causal_context(self.config, arithmetic, length=hidden.shape[0])
            for index, layer in enumerate(self.layers):
                hidden, _, captured = run_layer(layer, hidden, context, {}, {}, arithmetic=arithmetic, capture=capture)
                # jit returns a dict sorted by key; a trace goes in execution order.
                stages = [stage for stage in Stage if stage in captured]
                trace.update({(index, stage): trim(stage, captured[stage], count) for stage in stages})
            normed = run_norm(self.norm, hidden[:count], arithmetic=arithmetic)
            output = run_head(self.head, normed, arithmetic=arithmetic)
            trace[OUTSIDE, Stage.FINAL_NORM], trace[OUTSIDE, Stage.LM_HEAD] = normed, output
        return output, trace if capture else {}


def trim(stage: Stage, value: Any, count: int) -> Any:
    """A stage's rows of the real tokens; of scores and probabilities also the real keys."""
    if value.shape[0] == count:
        return value  # for scores the reshapes below would copy
    if stage not in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):
        return value[:count]
    padded = value.shape[0]
    return value[:count].reshape(count, -1, padded)[:, :, :count].reshape(count, -1)
