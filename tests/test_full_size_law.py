"""The scaling law of full-size runs: a line is told from other growth, whatever the start-up, and bars are held."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# (parameters of few layers, of all) by size.
SIZES = {"small": (1e9, 2e9), "middle": (1.5e9, 4e9), "large": (2e9, 8e9)}
FEW, ALL = 4, 28


@pytest.fixture(scope="module")
def law() -> Iterator[ModuleType]:
    """The script, which imports its neighbour by its bare name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("full_size_law")
    finally:
        sys.path.remove(str(FOLDER))


def misses(law: ModuleType, seconds: Callable[[float], float]) -> list[str]:
    """What a time by parameters misses of the bars."""
    runs = [
        law.Run(size, layers, "layers", int(count), 64, seconds(count), seconds(count), 1.0, "", True, "")
        for size, counts in SIZES.items()
        for layers, count in zip((FEW, ALL), counts, strict=True)
    ]
    return [miss for _, found in law.law_tables(runs, FEW) for miss in found]


@given(start=st.floats(0, 100), slope=st.floats(0.1, 100))
def test_a_line_is_found_again(law: ModuleType, start: float, slope: float) -> None:
    counts = [2.0, 4.0, 8.0]
    a, b = law.line(counts, [start + slope * count for count in counts])
    assert a == pytest.approx(start, abs=1e-6 * (start + slope))
    assert b == pytest.approx(slope, rel=1e-6)


def test_no_start_up_is_below_zero(law: ModuleType) -> None:
    a, b = law.line([1.0, 2.0, 4.0], [1.0, 4.0, 16.0])
    assert a == 0
    assert b > 0


@pytest.mark.parametrize("start", [0.0, 30.0])
def test_linear_growth_meets_the_law_with_any_start_up(law: ModuleType, start: float) -> None:
    assert misses(law, lambda count: start + 7e-9 * count) == []


@pytest.mark.parametrize("power", [0.5, 1.5, 2.0])
def test_other_growth_misses_it(law: ModuleType, power: float) -> None:
    said = misses(law, lambda count: (count / 1e9) ** power)
    assert any("large against small" in miss for miss in said)


def test_one_size_has_no_law(law: ModuleType) -> None:
    run = law.Run("small", ALL, "layers", 1, 64, 1.0, 1.0, 1.0, "", True, "")
    assert law.law_tables([run], FEW) == []
