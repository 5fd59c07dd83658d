"""Where a difference lies: by position and channel, against NumPy's own sums."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aprjax.bisect.metrics import Sums
from aprjax.bisect.spread import GROUPS, TOP_CHANNELS, Spread, SpreadSums

GENERATOR = np.random.default_rng(5)


def spread_of(*batches: tuple[np.ndarray, np.ndarray]) -> Spread | None:
    sums = SpreadSums()
    whole = Sums(sums)
    for model, ref in batches:
        whole.add(model, ref)
    return sums.spread()


@example(rows=25, width=1, cut=0, seed=0)
@given(st.integers(1, 40), st.integers(1, 900), st.integers(0, 40), st.integers(0, 2**32))
def test_positions_and_channels_are_what_their_definitions_say(rows: int, width: int, cut: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ref = generator.normal(size=(rows, width)).astype(np.float32)
    model = (ref + 10.0 ** -generator.uniform(0, 6, (rows, 1)) * generator.normal(size=ref.shape)).astype(np.float32)
    batches = [(model[part], ref[part]) for part in (slice(None, cut), slice(cut, None)) if model[part].size]
    found = spread_of(*batches)
    difference = np.square(model.astype(np.float64) - ref)
    if not difference.any():
        assert found is None
        return
    assert found is not None
    expected = np.sqrt(difference.sum(axis=1) / np.square(ref.astype(np.float64)).sum(axis=1))
    # A narrow row may round to its reference: minus infinity on both sides, which are then equal.
    with np.errstate(divide="ignore"):
        # Half a step of float16 at a logarithm between -32 and 32 is 2**-7.
        np.testing.assert_allclose(np.log2(found.positions()), np.log2(expected), atol=2**-7 + 1e-6)
    shares = difference.sum(axis=0) / difference.sum()
    assert len(found.channels) == min(TOP_CHANNELS, np.count_nonzero(shares))
    for channel, share in found.channels:
        assert share == pytest.approx(shares[channel])
    assert found.channels[0][1] == pytest.approx(shares.max())
    groups = np.frombuffer(found.groups, "<f2")
    assert groups.size == min(GROUPS, width)
    assert float(groups.sum()) == pytest.approx(1, abs=0.01)


def test_a_row_wider_than_a_piece_is_one_position() -> None:
    ref = np.ones((2, 70_000), np.float32)
    model = ref.copy()
    model[1, 69_999] += 2.0
    found = spread_of((model, ref))
    assert found is not None
    assert found.channels == ((69_999, 1.0),)
    first, second = np.frombuffer(found.by_position, "<f2")
    assert first == -math.inf
    assert second == pytest.approx(math.log2(2 / math.sqrt(70_000)), abs=0.01)


def test_equal_absent_and_not_finite_values_are_told_apart() -> None:
    ref = GENERATOR.normal(size=(4, 8)).astype(np.float32)
    assert spread_of((ref, ref)) is None
    assert SpreadSums().spread() is None
    model = ref.copy()
    model[1, 2], model[2, 3], ref[3] = np.nan, 9.0, 0.0
    found = spread_of((model, ref))
    assert found is not None
    values = np.frombuffer(found.by_position, "<f2")
    assert values[0] == -math.inf
    assert np.isnan(values[1])
    assert math.isfinite(values[2])
    assert np.isnan(values[3])
    # A share of something that is no number is none.
    assert found.channels == ()


def test_the_json_is_text() -> None:
    ref = GENERATOR.normal(size=(3, 5)).astype(np.float32)
    found = spread_of((ref + np.float32(0.5), ref))
    assert found is not None
    document = found.to_json()
    assert base64.b64decode(document["log2_rel_l2_by_position"]) == found.by_position
    assert document["width"] == 5
