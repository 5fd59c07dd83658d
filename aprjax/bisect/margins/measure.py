"""From two sides' logits to rows, their verdicts, the predicted flips and the summary. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from aprjax.bisect.margins.report import Distribution, FlipBound, Summary, TokenMargin
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS, log_softmax, margins
from aprjax.bisect.noise.logits import LogitNoise, plausible_tokens
from aprjax.bisect.report import Verdict
from aprjax.trace.generation import rank_of

FROM_NOISE = "the noise floor"
FROM_DRIFT = "the two sides' drift at the other positions"
# The median standard deviation of ten gaussian numbers falls short of theirs: the median of chi-squared with 9
# degrees of freedom is 8.343, and sqrt(9 / 8.343) is this.
MEDIAN_TO_SIGMA = 1.0386


def measure(row: TokenMargin, model: Float[np.ndarray, " vocab"], ref: Float[np.ndarray, " vocab"]) -> TokenMargin:
    """The row with everything that the two rows of logits say; the verdict is `judge`'s.

    Where a side's logits are not all finite, the row stays as it is but for its verdict: a divergence where
    they are the model's alone.
    """
    if not np.isfinite(ref).all():
        return replace(row, verdict=Verdict.UNMEASURED)
    if not np.isfinite(model).all():
        return replace(row, verdict=Verdict.DIVERGENCE)
    pair = margins(model[None], ref[None], [row.position])[0]
    ours, theirs = pair.model.top1, pair.ref.top1
    likeliest = plausible_tokens(ref[None])[0]
    moved = model[likeliest].astype(np.float64) - ref[likeliest].astype(np.float64)
    norms = float(np.linalg.norm(model.astype(np.float64))) * float(np.linalg.norm(ref.astype(np.float64)))
    dot = float(np.sum(model.astype(np.float64) * ref.astype(np.float64)))
    measured = replace(
        row,
        model=pair.model,
        ref=pair.ref,
        flip=pair.flip,
        rank=rank_of(ref, ours),
        gap=pair.gap,
        model_rank=rank_of(model, theirs),
        model_gap=float(model[ours]) - float(model[theirs]),
        kl=pair.kl,
        # Rounding may carry a cosine past 1.
        cosine=min(1.0, max(-1.0, dot / norms)) if norms > 0 else None,
        rms_delta=pair.rms_delta,
        max_delta=pair.max_delta,
        drift=float(moved.std(ddof=1)) if len(moved) > 1 else 0.0,
    )
    if row.target is None:
        return measured
    losses = [-float(log_softmax(side)[row.target]) for side in (model, ref)]
    return replace(
        measured,
        model_loss=losses[0],
        ref_loss=losses[1],
        model_probability=math.exp(-losses[0]),
        ref_probability=math.exp(-losses[1]),
    )


def predict_flips(
    margins_of_ref: Sequence[float | None], drifts: Sequence[float | None], noise: LogitNoise | None
) -> list[tuple[str, list[float | None], tuple[int, ...]]]:
    """Before any flip is looked at: (source, sigma at each position, positions whose margin lies within reach).

    A gap may move by `NEAR_TIE_SIGMAS` sigma: that is the reach. The noise floor needs no second side. The drift
    at a position is the median of the *other* positions', so that a flip does not list itself, and one wild
    position does not list all others.
    """
    found = [(FROM_DRIFT, _medians_of_the_others(drifts))]
    if noise is not None:
        found.insert(0, (FROM_NOISE, [noise.sigma] * len(margins_of_ref)))
    return [(source, sigmas, _within_reach(margins_of_ref, sigmas)) for source, sigmas in found]


def _medians_of_the_others(values: Sequence[float | None]) -> list[float | None]:
    """For each value the median of all others, as a standard deviation; None where there is no other."""
    known = [index for index, value in enumerate(values) if value is not None]
    order = sorted(known, key=lambda index: values[index] or 0.0)
    ranked = [values[index] or 0.0 for index in order]
    rank = {index: place for place, index in enumerate(order)}
    found: list[float | None] = []
    for index in range(len(values)):
        # Without a value of its own a position has all of them for others.
        left_out = rank.get(index, len(ranked))
        rest = len(ranked) - (index in rank)
        if not rest:
            found.append(None)
            continue
        middle = {(rest - 1) // 2, rest // 2}
        found.append(MEDIAN_TO_SIGMA * float(np.mean([ranked[place + (place >= left_out)] for place in middle])))
    return found


def _within_reach(margins_of_ref: Sequence[float | None], sigmas: list[float | None]) -> tuple[int, ...]:
    return tuple(
        index
        for index, (margin, sigma) in enumerate(zip(margins_of_ref, sigmas, strict=True))
        # Without any drift nothing moves, not even an exact tie.
        if margin is not None and sigma and margin <= NEAR_TIE_SIGMAS * sigma
    )


def judge(
    rows: Sequence[TokenMargin], noise: LogitNoise | None
) -> tuple[tuple[TokenMargin, ...], tuple[FlipBound, ...]]:
    """The rows with their verdicts and risks, and the bounds on flips with what came of them."""
    ref_margins = [None if row.ref is None else row.ref.margin for row in rows]
    bounds, at_risk = [], set()
    for source, sigmas, listed in predict_flips(ref_margins, [row.drift for row in rows], noise):
        at_risk |= set(listed)
        bounds.append(_compared(rows, source, sigmas, listed))
    judged = tuple(_judged(row, noise, at_risk=index in at_risk) for index, row in enumerate(rows))
    return judged, tuple(bounds)


def _compared(
    rows: Sequence[TokenMargin],
    source: str,
    sigmas: list[float | None],
    listed: tuple[int, ...],
) -> FlipBound:
    flips = [index for index, row in enumerate(rows) if row.flip]
    known = [sigma for sigma in sigmas if sigma is not None]
    # A gap's change has the standard deviation sqrt(2) sigma: P(change > margin) = erfc(margin / (2 sigma)) / 2.
    chances = [
        math.erfc(row.ref.margin / (2 * sigma)) / 2
        for row, sigma in zip(rows, sigmas, strict=True)
        if row.ref is not None and sigma
    ]
    return FlipBound(
        source=source,
        reach=NEAR_TIE_SIGMAS * float(np.median(known)) if known else None,
        listed=listed,
        expected=sum(chances) if known else None,
        flips=len(flips),
        caught=sum(index in set(listed) for index in flips),
        missed=tuple(index for index in flips if index not in set(listed)),
    )


def _judged(row: TokenMargin, noise: LogitNoise | None, *, at_risk: bool) -> TokenMargin:
    if row.ref is None:
        return row
    gap = row.widest_gap or 0.0
    in_sigmas = None if noise is None else noise.in_sigmas(gap)
    margin = None if noise is None else noise.in_sigmas(row.ref.margin)
    return replace(row, at_risk=at_risk, gap_sigmas=in_sigmas, margin_sigmas=margin, verdict=_verdict(row, gap, noise))


def _verdict(row: TokenMargin, gap: float, noise: LogitNoise | None) -> Verdict:
    if not row.flip:
        return Verdict.AGREE
    if noise is None:
        return Verdict.UNMEASURED
    # Both gaps: where the reference is undecided and the model is sure, noise is no explanation.
    return Verdict.NEAR_TIE if noise.is_near_tie(gap, row.rank or 0) else Verdict.DIVERGENCE


def distribution(values: Sequence[float]) -> Distribution | None:
    """The distribution of a measure; None of no values."""
    if not len(values):
        return None
    x = np.asarray(values, np.float64)
    at = np.percentile(x, [1, 5, 50, 95, 99, 99.9])
    return Distribution(
        count=len(x),
        mean=float(x.mean()),
        error=float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None,
        rms=float(np.sqrt(np.mean(x**2))),
        minimum=float(x.min()),
        percent_1=float(at[0]),
        percent_5=float(at[1]),
        median=float(at[2]),
        percent_95=float(at[3]),
        percent_99=float(at[4]),
        percent_99_9=float(at[5]),
        maximum=float(x.max()),
    )


def summarize(rows: Sequence[TokenMargin]) -> Summary:
    """All measured rows together; rows of logits that are not finite are left out."""
    kept = [row for row in rows if row.ref is not None]
    count = len(kept)
    same = sum(not row.flip for row in kept) / count if count else None
    pairs = [(row.model_loss, row.ref_loss) for row in kept if row.model_loss is not None and row.ref_loss is not None]
    ours, theirs = (np.array([pair[side] for pair in pairs], np.float64) for side in (0, 1))
    changes = [
        row.model_probability - row.ref_probability
        for row in kept
        if row.model_probability is not None and row.ref_probability is not None
    ]
    varied = len(pairs) > 1 and ours.std() > 0 and theirs.std() > 0
    return Summary(
        positions=count,
        same_top=same,
        same_top_error=None if same is None or count < 2 else math.sqrt(same * (1 - same) / (count - 1)),
        kl=distribution([row.kl for row in kept if row.kl is not None]),
        probability_change=distribution(changes),
        max_delta=distribution([row.max_delta for row in kept if row.max_delta is not None]),
        model_perplexity=_perplexity(ours),
        ref_perplexity=_perplexity(theirs),
        log_ratio=float((ours - theirs).mean()) if pairs else None,
        log_ratio_error=float((ours - theirs).std(ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else None,
        correlation=float(np.corrcoef(ours, theirs)[0, 1]) if varied else None,
    )


def _perplexity(losses: np.ndarray) -> float | None:
    # Beyond this the exponential overflows: a model that knows nothing at all has ln(151,936) = 12.
    return math.exp(float(losses.mean())) if losses.size and losses.mean() < 700 else None
