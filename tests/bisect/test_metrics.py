"""The distances, against their textbook definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.bisect.metrics import (
    ComparisonError,
    Sums,
    distance,
    massive_channels,
    relative_l2,
    without_channels,
)

GENERATOR = np.random.default_rng(3)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two values of one shape, up to a few chunks long, with a shared offset that cancellation could trip over."""
    rows, width = draw(st.integers(1, 60)), draw(st.integers(1, 900))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    ref = generator.normal(draw(st.sampled_from([0.0, 30.0])), 1.0, (rows, width)).astype(np.float32)
    size = draw(st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
    return (ref + size * generator.normal(size=ref.shape)).astype(np.float32), ref


@given(pairs())
def test_every_measure_is_what_its_definition_says(pair: tuple[np.ndarray, np.ndarray]) -> None:
    model, ref = pair
    a, b = model.astype(np.float64), ref.astype(np.float64)
    found = distance(model, ref)
    delta = np.abs(a - b)
    # Double precision sums of up to 54,000 terms: 1e-12 relative, and 1e-9 for the variance's difference of sums.
    assert found.rel_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-9)
    assert found.rms_ratio == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    if a.size > 1:
        assert found.std_ratio == pytest.approx(a.std(ddof=1) / b.std(ddof=1), rel=1e-6)
    assert found.max_abs == delta.max()
    assert delta[found.max_abs_at] == delta.max()
    assert found.share_1e3 == pytest.approx((delta > 1e-3 * np.abs(b)).mean())
    assert found.share_5e3 == pytest.approx((delta > 5e-3 * np.abs(b)).mean())
    assert found.count == a.size


@given(pairs(), st.integers(0, 60))
def test_batches_of_rows_give_what_all_rows_give(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    model, ref = pair
    parts = Sums()
    for rows in (slice(None, cut), slice(cut, None)):
        if model[rows].size:
            parts.add(model[rows], ref[rows])
    whole = distance(model, ref)
    assert parts.distance().max_abs_at == whole.max_abs_at
    assert parts.rel_l2 == pytest.approx(whole.rel_l2, rel=1e-12)


def test_other_selections_are_an_error_and_no_ratio() -> None:
    """The mistake behind the ratio of 18.23: all positions on one side, the last one on the other."""
    every = np.ones((7, 32), np.float32)
    with pytest.raises(ComparisonError, match=r"\[7, 32\].*\[1, 32\]"):
        distance(every, every[-1:])


def test_pooled_std_of_all_positions_is_not_that_of_the_last() -> None:
    """Why that mistake looks like a finding: one row of massive values dominates a pooled deviation."""
    value = GENERATOR.normal(0, 0.07, (7, 4096)).astype(np.float32)
    value[0] *= 40
    assert value.std(ddof=1) / value[-1:].std(ddof=1) > 10
    assert distance(value[-1:], value[-1:]).std_ratio == 1.0


def test_identical_values_are_at_distance_zero() -> None:
    value = GENERATOR.normal(size=(3, 50)).astype(np.float32)
    found = distance(value, value.copy())
    assert (found.rel_l2, found.max_abs, found.share_1e3) == (0.0, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert relative_l2(np.zeros((2, 2)), np.zeros((2, 2))) == 0.0


def test_what_has_no_value_is_none_and_not_zero() -> None:
    zeros, ones = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    against_nothing = distance(ones, zeros)
    assert against_nothing.rel_l2 is None
    assert against_nothing.cosine is None
    assert against_nothing.std_ratio is None
    assert distance(zeros, ones).rel_l2 == 1.0


def test_nan_is_neither_hidden_nor_turned_into_a_number() -> None:
    ref = GENERATOR.normal(size=(5, 70_000)).astype(np.float32)
    model = ref.copy()
    model[2, 60_001] = np.nan
    model[4, 3] = 1e9
    found = distance(model, ref)
    assert found.max_abs_at == (2, 60_001)
    assert found.max_abs is None
    assert found.rel_l2 is None
    assert found.cosine is None


def test_massive_channels_are_found_and_set_aside() -> None:
    ref = GENERATOR.normal(size=(7, 1536)).astype(np.float32)
    assert massive_channels(ref) == ()
    ref[0, 408], ref[3, 17] = -146.68 * 3, 200.0
    assert massive_channels(ref) == (408, 17)
    assert np.abs(without_channels(ref, (408, 17))).max() < 10
    # However many stand out, most of the width stays.
    ref[:, :700] *= 1e4
    assert len(massive_channels(ref)) == 15
