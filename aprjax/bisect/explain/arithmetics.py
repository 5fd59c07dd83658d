"""Hypotheses about how products are computed: what activations are quantized to, each way alone."""

from __future__ import annotations

from collections.abc import Callable

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain.activations import partner_of
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Hypothesis, Node
from aprjax.bisect.explain.proposals import choice, kernel_step
from aprjax.bisect.explain.variant import Activations
from aprjax.qwen2.stages import Stage

PRODUCTS = tuple(stage for stage in Stage if stage in MATMUL_STAGES)


# The rest of the trace's own way, by an `Arithmetic`'s choices.
_OWN: dict[str, Activations] = {"dequantize": "as they are"}


def _applies(kind: Activations) -> Callable[[Evidence, Node], bool]:
    def applies(evidence: Evidence, node: Node) -> bool:
        arithmetic = evidence.product_arithmetic
        own = _OWN.get(arithmetic.matmul, arithmetic.activations)
        types = {
            (tensor.block_type, tensor.shape[-1])
            for step in evidence.chain(node)
            if step[1] in MATMUL_STAGES
            for tensor in evidence.tensors(step)
        }
        # Where it makes no difference to these weights, it explains nothing.
        return any(partner_of(kind, *of) != partner_of(own, *of) for of in types)

    return applies


def _quantized(slug: str, kind: Activations, sentence: str) -> Hypothesis:
    step = (
        f"{kernel_step(PRODUCTS, 'what it quantizes activations to')}; `replay --arithmetic auto` tries whole presets"
    )
    return choice(f"activations-{slug}", PRODUCTS, sentence, applies=_applies(kind), next_step=step, activations=kind)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _quantized("not-quantized", "as they are", "products take activations as they are, not quantized"),
    _quantized("engine", "engine", "activations are quantized to what ggml pairs with each weight's type"),
    _quantized("per-256", "per 256", "activations are quantized per 256 (Q8_K) for every weight"),
    _quantized("per-32", "per 32", "activations are quantized per 32 (Q8_1) for every weight"),
    _quantized("realizar", "realizar", "activations are quantized as realizar does, by weight type"),
    *(
        choice(
            f"activations-{kind}",
            PRODUCTS,
            f"activations are rounded to {kind} before the product",
            activations=kind,
        )
        for kind in ("float16", "bfloat16")
    ),
)
