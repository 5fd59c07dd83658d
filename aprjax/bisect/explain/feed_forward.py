"""Hypotheses about the feed-forward, the residuals, the head, and values that are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

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


def _residuals() -> Iterator[Hypothesis]:
    for name, words, stage in _RESIDUALS:
        skip, branch = f"{name}_skip", f"{name}_branch"
        yield choice(
            f"{name}-residual-missing", (stage,), f"{words} is not added to the residual stream", **{skip: 0.0}
        )
        yield choice(f"{name}-output-missing", (stage,), f"the residual stream goes past {words}", **{branch: 0.0})
        yield choice(f"{name}-output-doubled", (stage,), f"{words} is added twice", **{branch: 2.0})
        yield choice(
            f"{name}-residual-doubled", (stage,), f"the residual stream is added twice to {words}", **{skip: 2.0}
        )
        yield choice(
            f"{name}-residual-from-norm",
            (stage,),
            f"{words} is added to its normalised input instead of its input",
            skip_from_norm=True,
        )
        for field, what in ((branch, words), (skip, "the residual stream")):
            yield fitted(
                f"{field.replace('_', '-')}-scaled",
                (stage,),
                Number("factor", _setter(field)),
                lambda value, error, evidence, what=what, words=words: (
                    f"{what} is multiplied by {with_error(value, error)} where {words} joins it"
                ),
                generalises=tuple(
                    f"{name}-{part}"
                    for part in ("residual-missing", "output-missing", "output-doubled", "residual-doubled")
                ),
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
_SCALES = tuple(
    (slug, Stage.ATTN_SCORES)
    for slug in ("attn-scale", "attn-scale-missing", "attn-scale-multiplied", "attn-scale-twice", "attn-scale-hidden")
)
SCALED: tuple[Hypothesis, ...] = (
    *(choice(f"zero-{stage}", (stage,), f"{stage} is zero", factors={stage: 0.0}) for stage in Stage),
    *(_scaled(stage) for stage in Stage),
)
