"""Hypotheses about attention: biases, scale, mask, heads, the cache, the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.fit import FitSpec
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node, Parameter
from aprjax.bisect.explain.proposals import Number, choice, fitted, kernel_step, misfit, shown, with_error
from aprjax.bisect.explain.variant import Rounding, Variant
from aprjax.qwen2.stages import Stage

BIAS = (Stage.QKV_BIAS,)
SCORES = (Stage.ATTN_SCORES,)
SOFTMAX = (Stage.ATTN_SOFTMAX,)
ATTENTION = (Stage.ATTENTION,)
READS_HEADS = (Stage.ATTN_SCORES, Stage.ATTENTION)
CACHED = (Stage.ATTN_SCORES, Stage.ATTENTION)
# Windows that are tried where whole layers are computed for each.
_WINDOWS = tuple(2**n for n in range(13))
# Scales with a reason, the likeliest first.
SCALES = ("attn-scale-missing", "attn-scale-multiplied", "attn-scale-twice", "attn-scale-hidden")
_PROJECTIONS = ("q", "k", "v")
_HEAD_MAPS = (
    ("interleaved", "head modulo KV heads instead of head divided by the group"),
    ("reversed", "in reverse order"),
    ("first", "all of them the first"),
)


def _biases() -> Iterator[Hypothesis]:
    for factor, slug, words in ((0.0, "missing", "is missing"), (2.0, "doubled", "is added twice")):
        everything = (factor,) * 3
        yield choice(f"bias-{slug}", BIAS, f"the bias of q, k and v {words}", bias=everything)
    for factor, slug, words in ((0.0, "missing", "is missing"), (2.0, "doubled", "is added twice")):
        for index, name in enumerate(_PROJECTIONS):
            factors = tuple(factor if i == index else 1.0 for i in range(3))
            yield choice(f"bias-{slug}-{name}", BIAS, f"the bias of {name} {words}", bias=factors)
    for index, name in enumerate(_PROJECTIONS):
        factors = tuple(float(i == index) for i in range(3))
        first, second = (other for other in _PROJECTIONS if other != name)
        yield choice(
            f"bias-missing-{first}{second}", BIAS, f"the biases of {first} and {second} are missing", bias=factors
        )


def _with_scale(variant: Variant, value: Any) -> Variant:
    return replace(variant, score_scale=value)


def _with_cap(variant: Variant, value: Any) -> Variant:
    return replace(variant, score_cap=value)


def _with_temperature(variant: Variant, value: Any) -> Variant:
    # By its inverse, in which scores are linear.
    return replace(variant, temperature=1 / value)


def _scales(evidence: Evidence) -> dict[str, tuple[float, str]]:
    width = evidence.config.head_dim
    return {
        "attn-scale-missing": (1.0, "scores are not scaled by 1 / root of the head's width"),
        "attn-scale-multiplied": (width**0.5, "scores are multiplied by the root of the head's width"),
        "attn-scale-twice": (1 / width, "scores are scaled twice: divided by the head's width instead of its root"),
        "attn-scale-hidden": (evidence.config.hidden_size**-0.5, "scores are scaled by the hidden width's root"),
    }


def _scale(slug: str) -> Hypothesis:
    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        value, sentence = _scales(evidence)[slug]
        right = evidence.config.head_dim**-0.5
        yield Candidate(
            sentence, lambda v: replace(v, score_scale=value), parameters={"score_scale": Parameter(value, None, right)}
        )

    step = kernel_step(SCORES, "its scale")
    return Hypothesis(slug, "computation", frozenset(SCORES), test, step, step)


def _cached(kind: Rounding) -> Hypothesis:
    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        own = evidence.arithmetic.kv_cache == kind
        for alone, words in ((False, ""), (True, ", queries and probabilities are not")):
            if not own or alone:
                sentence = f"keys and values are kept in {kind}{words}"
                yield Candidate(sentence, partial(replace, cache=kind, cache_alone=alone))

    step = f"a {kind} cache is an option of the engine: run it with a float32 one, or name its arithmetic"
    return Hypothesis(f"kv-{kind}", "computation", frozenset(CACHED), test, step, step)


def _windows(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    count = len(evidence.positions)
    # All of them where only a softmax is computed for each.
    options = range(1, count) if node[1] is Stage.ATTN_SOFTMAX else [w for w in _WINDOWS if w < count]
    spec = FitSpec(lambda variant, value: replace(variant, window=int(value)), frozenset(SOFTMAX))
    probabilities = evidence.value(node) if node[1] is Stage.ATTN_SOFTMAX else None
    if probabilities is not None:
        # The trace itself says how many keys were seen.
        seen = np.count_nonzero(probabilities.reshape(count, -1, count), axis=2)
        options = [int(seen.max())] if 0 < seen.max() < count else []
    if not options:
        return
    best = min(options, key=lambda window: misfit(evidence, node, spec, window))
    yield Candidate(
        f"a query sees the last {best} keys only (sliding window)",
        lambda variant: replace(variant, window=best),
        parameters={"window": Parameter(best, None, None)},
        next_step="turn the sliding window off: this model's config does not use it for these layers",
    )


HYPOTHESES: tuple[Hypothesis, ...] = (
    *_biases(),
    *(
        _scale(slug)
        for slug in ("attn-scale-missing", "attn-scale-multiplied", "attn-scale-twice", "attn-scale-hidden")
    ),
    fitted(
        "attn-scale",
        SCORES,
        Number("score_scale", _with_scale, lambda config: config.head_dim**-0.5),
        lambda value, error, evidence: (
            f"scores are scaled by {with_error(value, error)} instead of {shown(evidence.config.head_dim**-0.5)}"
        ),
        next_step="correct the scale of attention scores: the engine ran with {value}",
        generalises=SCALES,
    ),
    *(
        choice(
            f"kv-heads-{slug}",
            READS_HEADS,
            f"query heads read the wrong key and value heads: {words}",
            applies=lambda evidence, node: evidence.config.num_kv_heads > 1,
            heads=slug,
        )
        for slug, words in _HEAD_MAPS
    ),
    *(
        choice(
            f"{what}-heads-{slug}",
            stages,
            f"query heads read the wrong {what} heads: {words}",
            applies=lambda evidence, node: evidence.config.num_kv_heads > 1,
            heads=slug,
        )
        for what, stages in (("key", SCORES), ("value", ATTENTION))
        for slug, words in _HEAD_MAPS
    ),
    *(
        choice(f"mask-{slug}", SOFTMAX, words, mask=mask)
        for slug, words, mask in (
            ("missing", "there is no causal mask: queries see later keys", "none"),
            ("too-short", "the mask hides a query's own position", "own position hidden"),
            ("too-long", "the mask lets a query see the next position", "next position visible"),
        )
    ),
    Hypothesis(
        "sliding-window", "config", frozenset(SOFTMAX), _windows, kernel_step(SOFTMAX), kernel_step(SOFTMAX, "its mask")
    ),
    *(
        choice(
            f"{what}-cache-{slug}",
            stages,
            f"every query reads the {what}s of one position {words}: the cache is shifted",
            sets={f"{what}_lag": lag},
        )
        for what, stages in (("key", SCORES), ("value", ATTENTION))
        for slug, words, lag in (("behind", "before", 1), ("ahead", "after", -1))
    ),
    *map(_cached, ("float16", "bfloat16", "q8_0")),
    *(
        choice(f"softmax-{kind}", SOFTMAX, f"probabilities are rounded to {kind}", probabilities=kind)
        for kind in ("float16", "bfloat16")
    ),
    *(
        choice(f"softmax-{slug}", SOFTMAX, words, softmax=kind)
        for slug, words, kind in (
            ("not-normalised", "the exponentials are not divided by their sum", "not normalised"),
            (
                "one-more",
                "the softmax's sum has an extra term, of a score of zero",
                "one more in the sum",
            ),
        )
    ),
    *(
        choice(f"exponential-{slug}", SOFTMAX, words, exponential=slug)
        for slug, words in (
            ("schraudolph", "the exponential is Schraudolph's, a shifted exponent"),
            ("limit", "the exponential is (1 + x/1024)^1024"),
        )
    ),
    choice("exponential-base-2", SOFTMAX, "the softmax takes powers of 2 instead of e", exponential="base 2"),
    fitted(
        "softmax-temperature",
        SOFTMAX,
        Number("factor", _with_temperature),
        lambda value, error, evidence: f"the softmax's scores are multiplied by {with_error(value, error)}",
        generalises=("exponential-base-2",),
    ),
    fitted(
        "attn-softcap",
        SCORES,
        Number("score_cap", _with_cap, neutral=50.0, logarithmic=True),
        lambda value, error, evidence: f"scores are capped by {with_error(value, error)} * tanh (as Gemma 2 does)",
    ),
)
