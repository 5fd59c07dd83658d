"""Rows, verdicts, foreseen flips and the summary, from logits alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprjax.bisect.margins.measure import (
    FROM_DRIFT,
    FROM_NOISE,
    MEDIAN_TO_SIGMA,
    distribution,
    judge,
    measure,
    predict_flips,
    summarize,
)
from aprjax.bisect.margins.pair import pieces_of
from aprjax.bisect.margins.report import FedTokens, TokenMargin
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.logits import LogitNoise
from aprjax.bisect.report import Verdict

NOISE = LogitNoise(0.1, (), (0,))
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=12, max_size=12)


def row(target: int | None = None) -> TokenMargin:
    return TokenMargin(0, 0, 7, "seven", "prompt", target)


def measured(model: list[float], ref: list[float], target: int | None = None) -> TokenMargin:
    return measure(row(target), np.array(model, np.float32), np.array(ref, np.float32))


def test_a_row_by_hand() -> None:
    found = measured([1.0, 3.0, 2.5, 0.0], [2.0, 1.0, 2.75, -1.0], target=0)
    assert (found.model and found.model.top1, found.ref and found.ref.top1) == (1, 2)
    assert found.flip
    # The model's choice, 1, is third for the reference; the reference's, 2, second for the model.
    assert (found.rank, found.gap) == (3, 1.75)
    assert (found.model_rank, found.model_gap) == (2, 0.5)
    assert found.widest_gap == 1.75
    assert found.max_delta == 2.0
    p = np.exp([2.0, 1.0, 2.75, -1.0]) / np.exp([2.0, 1.0, 2.75, -1.0]).sum()
    q = np.exp([1.0, 3.0, 2.5, 0.0]) / np.exp([1.0, 3.0, 2.5, 0.0]).sum()
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()))
    assert (found.model_probability, found.ref_probability) == (pytest.approx(q[0]), pytest.approx(p[0]))
    assert found.ref_loss == pytest.approx(-math.log(p[0]))
    delta = np.array([-1.0, 2.0, -0.25, 1.0])
    assert found.drift == pytest.approx(delta.std(ddof=1))
    assert found.cosine == pytest.approx(11.875 / math.sqrt(16.25 * 13.5625))


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_rows_of_any_logits(model: list[float], ref: list[float]) -> None:
    found, mirrored = measured(model, ref), measured(ref, model)
    a, b = np.array(model, np.float32), np.array(ref, np.float32)
    assert found.flip == (int(a.argmax()) != int(b.argmax()))
    order = sorted(range(12), key=lambda token: (-b[token], token))
    assert found.rank == order.index(int(a.argmax())) + 1
    assert (found.gap, found.rank) == (mirrored.model_gap, mirrored.model_rank)
    assert found.gap is not None
    assert found.gap >= 0
    assert (found.gap == 0) or found.flip
    assert found.kl is not None
    assert found.kl >= 0
    if a.any() and b.any():
        dot = float(a.astype(np.float64) @ b.astype(np.float64))
        norms = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
        assert found.cosine == pytest.approx(dot / norms, abs=1e-9)


@settings(deadline=None)
@given(LOGITS)
def test_equal_logits_agree_in_everything(logits: list[float]) -> None:
    found = measured(logits, logits, target=3)
    assert (found.flip, found.rank, found.gap, found.kl, found.drift) == (False, 1, 0.0, 0.0, 0.0)
    assert found.model_loss == found.ref_loss
    # Half a power of two more for every token moves nothing that matters.
    shifted = measured([value + 32.0 for value in logits], logits, target=3)
    assert shifted.kl == pytest.approx(0.0, abs=1e-5)
    assert shifted.drift == pytest.approx(0.0, abs=1e-5)


def flipped(gap: float, *, model_gap: float | None = None, third: float = -9.0) -> TokenMargin:
    """A row whose reference prefers 0 to 1 by `gap`, and whose model prefers 1 by `model_gap`."""
    resists = gap if model_gap is None else model_gap
    return measured([0.0, resists, -9.0], [gap, 0.0, third])


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (measured([1.0, 0.0], [1.0, 0.5]), Verdict.AGREE),
        (flipped(0.42), Verdict.NEAR_TIE),
        (flipped(0.43), Verdict.DIVERGENCE),
        # The reference is undecided, the model is sure of itself: that is more than noise.
        (flipped(0.01, model_gap=2.0), Verdict.DIVERGENCE),
        # Third of three near-equal tokens.
        (flipped(0.1, third=0.05), Verdict.DIVERGENCE),
    ],
)
def test_verdicts_of_one_row(found: TokenMargin, verdict: Verdict) -> None:
    judged = judge([found], NOISE)[0][0]
    assert judged.verdict is verdict
    assert judged.gap_sigmas == pytest.approx((found.widest_gap or 0.0) / 0.1)
    assert judge([found], None)[0][0].verdict is (Verdict.UNMEASURED if found.flip else Verdict.AGREE)


def test_logits_that_are_not_finite() -> None:
    assert measured([1.0, math.nan], [1.0, 0.0]).verdict is Verdict.DIVERGENCE
    assert measured([1.0, 2.0], [1.0, math.inf]).verdict is Verdict.UNMEASURED
    assert measured([math.nan, 2.0], [math.nan, 0.0]).verdict is Verdict.UNMEASURED
    rows, _ = judge([measured([1.0, math.nan], [1.0, 0.0]), measured([1.0, 0.0], [1.0, 0.0])], NOISE)
    assert [r.verdict for r in rows] == [Verdict.DIVERGENCE, Verdict.AGREE]
    assert summarize(rows).positions == 1
    json.dumps([r.to_json() for r in rows], allow_nan=False)


def test_a_position_does_not_list_itself() -> None:
    """The reach at a position is the median of the others' drift: one wild position lists neither itself nor them."""
    assert predict_flips([1.0] * 5, [9.0, 0, 0, 0, 0], None) == [(FROM_DRIFT, [0.0] * 5, ())]
    drifts = [0.3, None, 0.1, 0.7, 0.2]
    (_, sigmas, listed), *_ = predict_flips([1.0, 1.0, None, 1.0, 2.0], drifts, None)
    assert sigmas == [pytest.approx(MEDIAN_TO_SIGMA * x) for x in (0.2, 0.25, 0.3, 0.2, 0.3)]
    assert listed == (1,)
    # 0.1 * 4.24 reaches margins of 0.42; a position without logits counts for nothing.
    (source, sigmas, found), _ = predict_flips([0.42, 0.43, None], [0.0, 0.0, None], NOISE)
    assert (source, sigmas, found) == (FROM_NOISE, [0.1] * 3, (0,))
    # No drift anywhere: nothing moves, not even an exact tie.
    assert predict_flips([0.0, 0.0], [0.0, 0.0], None)[0][2] == ()
    assert predict_flips([0.0], [1.0], None)[0][1] == [None]


@given(st.lists(st.floats(0, 9), min_size=2, max_size=9))
def test_the_drift_of_the_others_is_their_median(drifts: list[float]) -> None:
    ((_, sigmas, _),) = predict_flips([None] * len(drifts), drifts, None)
    assert sigmas == [
        pytest.approx(MEDIAN_TO_SIGMA * np.median(np.delete(drifts, index))) for index in range(len(drifts))
    ]


def test_flips_are_listed_before_they_are_looked_at() -> None:
    """The list depends on the reference's margins and the drift alone; gaussian drift flips as often as expected."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        ref = generator.normal(0, 1, 16).astype(np.float32)
        rows.append(measure(row(), ref + generator.normal(0, 0.1, 16).astype(np.float32), ref))
    judged, bounds = judge(rows, NOISE)
    by_noise, by_drift = bounds
    assert by_noise.source == FROM_NOISE
    assert by_drift.reach == pytest.approx(NEAR_TIE_SIGMAS * 0.1, rel=0.05)
    assert by_noise.flips == sum(r.flip for r in rows) > 10
    assert by_noise.caught == by_noise.flips - len(by_noise.missed)
    # Three standard deviations of a gap: 99.7 % of what happens.
    assert by_noise.recall == 1.0
    assert by_noise.expected == pytest.approx(by_noise.flips, abs=3 * math.sqrt(by_noise.flips))
    assert {index for index, r in enumerate(judged) if r.at_risk} == {*by_noise.listed, *by_drift.listed}
    unflipped = [replace(r, flip=False) for r in rows]
    assert [b.listed for b in judge(unflipped, NOISE)[1]] == [b.listed for b in bounds]
    assert judge(unflipped, NOISE)[1][0].recall is None


def test_the_summary_against_its_definitions() -> None:
    generator = np.random.default_rng(1)
    rows = [
        measured(list(generator.normal(0, 2, 12)), list(generator.normal(0, 2, 12)), target=int(generator.integers(12)))
        for _ in range(30)
    ]
    rows.append(measured([0.0, 1.0], [0.0, 1.0]))
    found = summarize(rows)
    ours = np.array([r.model_loss for r in rows[:30]], np.float64)
    theirs = np.array([r.ref_loss for r in rows[:30]], np.float64)
    assert found.positions == 31
    assert found.same_top == pytest.approx(sum(not r.flip for r in rows) / 31)
    assert found.model_perplexity == pytest.approx(math.exp(ours.mean()))
    assert found.log_ratio == pytest.approx(math.log(found.model_perplexity / (found.ref_perplexity or 0)))
    assert found.correlation == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    assert found.log_ratio_error == pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(30))
    assert found.probability_change is not None
    assert found.probability_change.count == 30
    assert found.probability_change.mean == pytest.approx(float(np.mean(np.exp(-ours) - np.exp(-theirs))))
    assert found.kl is not None
    kl = np.array([r.kl for r in rows])
    assert (found.kl.median, found.kl.percent_99, found.kl.maximum) == (
        pytest.approx(np.median(kl)),
        pytest.approx(np.quantile(kl, 0.99)),
        pytest.approx(kl.max()),
    )
    json.dumps(asdict(found), allow_nan=False)
    nothing = summarize([])
    assert (nothing.positions, nothing.same_top, nothing.kl, nothing.ref_perplexity) == (0, None, None, None)
    assert distribution([2.0]) is not None
    assert distribution([2.0]).error is None  # pyright: ignore[reportOptionalMemberAccess]


def test_a_text_is_cut_into_contexts_of_which_the_second_half_counts() -> None:
    def fed(count: int, context: int | None) -> FedTokens:
        return FedTokens("text", None, "none", tuple(range(count)), context=context)

    two = pieces_of(fed(19, 8))
    assert [piece.tokens for piece in two] == [tuple(range(8)), tuple(range(8, 16))]
    # The last token of a context has no successor in it.
    assert {piece.positions for piece in two} == {(4, 5, 6)}
    assert [p.positions for p in pieces_of(fed(5, 8))] == [(0, 1, 2, 3)]
    assert [p.positions for p in pieces_of(fed(1, 8))] == [(0,)]
    assert [p.positions for p in pieces_of(fed(3, None))] == [(0, 1, 2)]
    assert [p.positions for p in pieces_of(fed(3, None), (2,))] == [(2,)]
