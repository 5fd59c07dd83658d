"""Hypotheses about RMSNorm: epsilon, the mean, the weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Hypothesis, Node
from aprjax.bisect.explain.proposals import Number, choice, fitted, shown, with_error
from aprjax.bisect.explain.unseen import NORMS
from aprjax.bisect.explain.variant import Variant


def _with_eps(variant: Variant, value: Any) -> Variant:
    return replace(variant, eps=value)


def _eps_starts(evidence: Evidence, node: Node) -> Iterator[float]:
    yield evidence.config.rms_norm_eps
    yield from np.logspace(-12, 1, 14).tolist()


HYPOTHESES: tuple[Hypothesis, ...] = (
    choice("eps-missing", NORMS, "the norm adds no epsilon", kind="config", eps=0.0),
    fitted(
        "rms-eps",
        NORMS,
        Number("rms_norm_eps", _with_eps, lambda config: config.rms_norm_eps, starts=_eps_starts, logarithmic=True),
        lambda value, error, evidence: (
            f"rms_norm_eps = {with_error(value, error)} instead of {shown(evidence.config.rms_norm_eps)}"
        ),
        kind="config",
        next_step="correct rms_norm_eps: the engine ran with {value}; convert the model again, or fix what it reads",
        generalises=("eps-missing",),
    ),
    choice("eps-outside", NORMS, "epsilon is added to the root instead of under it", eps_outside=True),
    choice("layer-norm", NORMS, "the mean is taken off before the norm (LayerNorm)", norm="mean-subtracting"),
    choice("norm-missing", NORMS, "values are multiplied by the norm's weight, but not normalised", norm="none"),
    choice("norm-skipped", NORMS, "the norm is left out altogether", norms=0),
    choice("norm-twice", NORMS, "the norm is applied twice", norms=2),
    choice("norm-weight-plus-one", NORMS, "the norm multiplies by weight + 1 (as Gemma does)", norm_weight="plus one"),
    choice("norm-weight-missing", NORMS, "the norm's weight is not multiplied", norm_weight="none"),
    choice(
        "norm-weight-other",
        NORMS,
        "the weight of the layer's other norm is used",
        next_step="two norms are exchanged: check the names that input_layernorm and post_attention_layernorm map to",
        norm_weight="other norm's",
    ),
)
