"""The registry of hypotheses, in the order of simplicity: of equals, the earlier is the explanation."""

from __future__ import annotations

from aprjax.bisect.explain import arithmetics, attention, feed_forward, norms, rope
from aprjax.bisect.explain.hypothesis import Hypothesis
from aprjax.bisect.explain.weights import WEIGHTS

HYPOTHESES: tuple[Hypothesis, ...] = (
    *rope.HYPOTHESES,
    *norms.HYPOTHESES,
    *attention.HYPOTHESES,
    *feed_forward.ACTIVATIONS,
    *feed_forward.RESIDUALS,
    *arithmetics.HYPOTHESES,
    *(hypothesis for hypothesis in WEIGHTS if hypothesis.cheap),
    *feed_forward.SCALED,
    *(hypothesis for hypothesis in WEIGHTS if not hypothesis.cheap),
)
