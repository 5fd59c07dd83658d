"""Halving over drifts made up by boundary: a sharp fall is a place, an even one is not, and its half is found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aprjax.bisect.locate.search import _first_healed, _half

LAST = 28


def goal(drifts: list[float], floor: float) -> Any:
    """A goal whose runs drift as told, one value a boundary."""
    return SimpleNamespace(
        boundary=LAST,
        floor=floor,
        put_in=lambda boundary: SimpleNamespace(drift=drifts[boundary], healed=drifts[boundary] <= floor),
    )


@pytest.mark.parametrize("place", [0, 1, 13, 27, 28])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_sharp_fall_is_a_place(place: int, floor: float) -> None:
    drifts = [3.0 if boundary < place else 0.0 for boundary in range(LAST + 1)]
    assert _first_healed(goal(drifts, floor), 3.0) == (place, 3.0, 0.0)


def test_an_even_fall_is_no_place_and_its_half_is_found() -> None:
    drifts = [3.0 * (1 - boundary / LAST) for boundary in range(LAST + 1)]
    assert _first_healed(goal(drifts, 1.0), 3.0) is None
    assert _half(goal(drifts, 1.0), 3.0) == LAST // 2
