"""Hypotheses about how products are computed: each choice of an `Arithmetic` that changes a product, made alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node
from aprjax.bisect.explain.proposals import choice, kernel_step
from aprjax.blocks import block_format
from aprjax.qwen2.stages import Stage

PRODUCTS = tuple(stage for stage in Stage if stage in MATMUL_STAGES)


def _quantized(evidence: Evidence, node: Node) -> bool:
    """Whether a product on the way to the node has a weight whose activations an engine may quantize."""
    return any(
        block_format(tensor.block_type).activation is not None
        for step in evidence.chain(node)
        if step[1] in MATMUL_STAGES
        for tensor in evidence.tensors(step)
    )


def _arithmetic(slug: str, sentence: str, **choices: Any) -> Hypothesis:
    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        arithmetic = evidence.product_arithmetic
        changed = replace(arithmetic, name=slug, **choices)
        if replace(changed, name=arithmetic.name) != arithmetic and _quantized(evidence, node):
            yield Candidate(sentence, lambda variant: replace(variant, arithmetic=changed))

    step = kernel_step(("matrix products",), "what it quantizes activations to")  # type: ignore[arg-type]
    next_step = f"{step}; `replay --arithmetic auto` says which arithmetic fits every stage"
    return Hypothesis(slug, "computation", frozenset(PRODUCTS), test, next_step, step)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _arithmetic(
        "activations-not-quantized",
        "products take activations as they are: floats times decoded weights",
        matmul="dequantize",
    ),
    _arithmetic(
        "activations-by-weight",
        "activations are quantized to what ggml pairs with each weight's type (Q8_K per 256, Q8_0 or Q8_1 per 32)",
        matmul="integer",
        activations="engine",
    ),
    _arithmetic(
        "activations-per-256",
        "activations are quantized per 256 (Q8_K) for every weight",
        matmul="integer-as-float",
        activations="per 256",
    ),
    _arithmetic(
        "activations-per-32",
        "activations are quantized per 32 (Q8_1) for every weight",
        matmul="integer-as-float",
        activations="per 32",
    ),
    _arithmetic(
        "activations-realizar",
        "activations are quantized as realizar does, by weight type, ties away from zero",
        matmul="integer-as-float",
        activations="realizar",
    ),
    *(
        choice(
            f"activations-{kind}",
            PRODUCTS,
            f"activations are rounded to {kind} before the product",
            rounded=kind,
        )
        for kind in ("float16", "bfloat16", "q8_0")
    ),
)
