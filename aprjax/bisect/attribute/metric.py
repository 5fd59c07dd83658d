"""The number that is attributed: a margin between two tokens, or the KL divergence from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.model import precision_scope

Kind = Literal["margin", "kl"]


@partial(jax.tree_util.register_dataclass, data_fields=["chosen", "rival", "log_p"], meta_fields=["kind"])
@dataclass(frozen=True)
class Metric:
    """A differentiable number of the logits `[position, vocab]`, averaged over the positions.

    Attributes:
        kind: `margin` is the logit of `chosen` minus that of `rival`; `kl` is `KL(reference || x)` in nats.
        chosen: by position, the reference's best token.
        rival: by position, the token it is held against.
        log_p: the reference's log-probabilities.
    """

    kind: Kind
    chosen: Array
    rival: Array
    log_p: Float[Array, "position vocab"]

    def __call__(self, logits: Float[Array, "position vocab"]) -> Float[Array, ""]:
        """The number."""
        if self.kind == "kl":
            log_q = jax.nn.log_softmax(logits, axis=-1)
            return jnp.mean(jnp.sum(jnp.exp(self.log_p) * (self.log_p - log_q), axis=-1))
        rows = jnp.arange(logits.shape[0])
        return jnp.mean(logits[rows, self.chosen] - logits[rows, self.rival])

    def value(self, logits: Float[np.ndarray, "position vocab"]) -> float:
        """The number of a side's logits, in the type that gradients are taken in."""
        with precision_scope(preset(self.dtype)):
            return float(self(jnp.asarray(logits.astype(self.dtype))))

    @property
    def dtype(self) -> str:
        """float32 or float64."""
        return str(self.log_p.dtype)


def metric_between(kind: Kind, model: np.ndarray, ref: np.ndarray, dtype: str) -> Metric:
    """The metric for two sides' logits: the rival is the model's choice where it flips, else the reference's second."""
    best = ref.argmax(axis=1)
    others = ref.copy()
    others[np.arange(len(ref)), best] = -np.inf
    second = others.argmax(axis=1)
    theirs = model.argmax(axis=1)
    rival = np.where(theirs == best, second, theirs)
    with precision_scope(preset(dtype)):
        log_p: Any = jax.nn.log_softmax(jnp.asarray(ref.astype(dtype)), axis=-1)
    return Metric(kind, jnp.asarray(best), jnp.asarray(rival), log_p)
