"""Hypotheses about the feed-forward, the residuals, the head, and values that are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aprjax.bisect.explain.attention import SCALES
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Hypothesis
from aprjax.bisect.explain.programs import Shift
from aprjax.bisect.explain.proposals import Number, choice, fitted, with_error
from aprjax.bisect.explain.variant import Variant
from aprjax.qwen2.stages import Stage

SILU = (Stage.FFN_SILU,)
PRODUCT = (Stage.FFN_SWIGL,)
_RESIDUALS = (
    ("attention", "the attention's output", Stage.POST_ATTN_RESIDUAL),
    ("ffn", "the feed-forward's output", Stage.POST_FFN_RESIDUAL),
)

ACTIVATIONS: tuple[Hypothesis, ...] = (
    *(
        choice(f"activation-{kind}", SILU, f"the feed-forward's activation is {words} instead of SiLU", activation=kind)
        for kind, words in (
            ("quick-gelu", "x * sigmoid(1.702 x)"),
            ("gelu", "GELU"),
            ("gelu-tanh", "GELU (its tanh form)"),
            ("relu", "ReLU"),
            ("hard-swish", "hard swish"),
            ("sigmoid", "the sigmoid alone"),
            ("identity", "missing"),
        )
    ),
    choice(
        "gate-up-exchanged",
        PRODUCT,
        "gate and up have exchanged roles: silu(up) * gate",
        next_step="check which of gate_proj and up_proj the engine's fused tensor or kernel takes first",
        swapped=True,
    ),
)


_ADDITIONS = (
    ("residual-missing", "skip", 0.0, "{branch} is not added to the residual stream"),
    ("output-missing", "branch", 0.0, "the residual stream goes past {branch}"),
    ("output-doubled", "branch", 2.0, "{branch} is added twice"),
    ("residual-doubled", "skip", 2.0, "the residual stream is added twice to {branch}"),
)


def _residuals() -> Iterator[Hypothesis]:
    for name, branch, stage in _RESIDUALS:
        for slug, which, factor, words in _ADDITIONS:
            yield choice(f"{name}-{slug}", (stage,), words.format(branch=branch), sets={f"{name}_{which}": factor})
        yield choice(
            f"{name}-residual-from-norm",
            (stage,),
            f"{branch} is added to its normalised input instead of its input",
            skip_from_norm=True,
        )
        for which, what in (("branch", branch), ("skip", "the residual stream")):
            yield fitted(
                f"{name}-{which}-scaled",
                (stage,),
                Number("factor", _setter(f"{name}_{which}")),
                lambda value, error, evidence, what=what, branch=branch: (
                    f"{what} is multiplied by {with_error(value, error)} where {branch} joins it"
                ),
                generalises=tuple(f"{name}-{slug}" for slug, field, _, _ in _ADDITIONS if field == which),
            )


def _setter(field: str) -> Shift:
    def shift(variant: Variant, value: Any) -> Variant:
        return replace(variant, **{field: value})

    return shift


def _scaled(stage: Stage) -> Hypothesis:
    def shift(variant: Variant, value: Any) -> Variant:
        return replace(variant, factors={**variant.factors, stage: value * variant.factors.get(stage, 1.0)})

    def words(value: float, error: float, evidence: Evidence) -> str:
        return f"{stage} is multiplied by {with_error(value, error)}"

    special = tuple(slug for slug, where in _SCALES if where is stage)
    return fitted(f"scaled-{stage}", (stage,), Number("factor", shift), words, generalises=(f"zero-{stage}", *special))


RESIDUALS: tuple[Hypothesis, ...] = (
    *_residuals(),
    choice(
        "head-tied",
        (Stage.LM_HEAD,),
        "the logits are products with the embedding instead of lm_head.weight",
        kind="config",
        next_step="this model's head is its own tensor: turn tie_word_embeddings off, and load lm_head.weight",
        applies=lambda evidence, node: "lm_head.weight" in evidence.checkpoint.tensors,
        head="embedding",
    ),
)
# What scales a stage's whole value, too, and says why.
_SCALES = tuple((slug, Stage.ATTN_SCORES) for slug in ("attn-scale", *SCALES))
SCALED: tuple[Hypothesis, ...] = (
    *(choice(f"zero-{stage}", (stage,), f"{stage} is zero", factors={stage: 0.0}) for stage in Stage),
    *(_scaled(stage) for stage in Stage),
)
