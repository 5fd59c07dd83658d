"""Loops are found where they were put; text that repeats itself no more than honest text does is not graded."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from aprjax.text.degenerate import judge_text
from aprjax.text.repetition import measure_repetition


def prose(count: int, *, seed: int = 0) -> list[int]:
    """Tokens without any pattern."""
    return np.random.default_rng(seed).integers(1000, 100_000, count).tolist()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 12, 64, 200])
def test_text_without_repetition(count):
    found = measure_repetition(prose(count))
    assert (found.tokens, found.grade, found.loop, found.onset, found.distinct_share) == (count, "none", None, None, 1)


@pytest.mark.parametrize("period", [1, 2, 5, 20, 40])
@pytest.mark.parametrize("before", [0, 10, 60])
def test_a_loop_to_the_end(period, before):
    copies = max(4, -(-40 // period))
    ids = prose(before) + list(range(period)) * copies + [0][: period - 1]
    found = measure_repetition(ids)
    assert found.grade == "degenerate"
    assert found.loop is not None
    assert (found.loop.start, found.loop.end, found.loop.period) == (before, len(ids), period)
    # The second copy is the first that says something again.
    assert found.onset == before + period


def test_the_storys_loop():
    # "\ns\ns…" as two tokens a copy, after an answer of twenty tokens.
    found = measure_repetition(prose(20) + [198, 82] * 30)
    assert (found.grade, found.onset) == ("degenerate", 22)
    assert found.reason == "the last 60 tokens say the same 2 again and again (30.0 times)"


def test_grades_by_length_and_copies():
    assert measure_repetition(prose(4) + [7] * 11).grade == "mild"
    assert measure_repetition(prose(4) + [7] * 12).grade == "degenerate"
    # A quarter of the text is not enough of a loop below, and is above.
    assert measure_repetition(prose(100) + [7] * 30).grade == "mild"
    assert measure_repetition(prose(80) + [7] * 30).grade == "degenerate"
    # Two copies of a sentence are mild, three are not.
    sentence = prose(20, seed=1)
    assert measure_repetition(prose(10) + sentence * 2).grade == "mild"
    assert measure_repetition(prose(10) + sentence * 3).grade == "degenerate"
    assert measure_repetition(prose(10) + sentence[:3] * 2).grade == "none"


def test_a_loop_that_is_left_again_is_mild():
    found = measure_repetition(prose(50) + [1, 2, 3] * 8 + prose(100, seed=1))
    assert (found.grade, found.onset) == ("mild", 53)
    assert found.loop is not None
    assert (found.loop.start, found.loop.end, found.loop.period) == (50, 74, 3)
    assert measure_repetition(prose(50) + [1, 2, 3] * 7 + prose(100, seed=1)).grade == "none"


def test_copies_that_differ_a_little_show_in_the_distinct_share():
    # A list that counts on: nothing is periodic, since one token of eight is another each time.
    ids = prose(30) + [token for number in range(60) for token in (1, 2, 3, 4, 5, 6, 7, 5000 + number)]
    found = measure_repetition(ids)
    assert found.loop is None
    assert found.distinct_share == pytest.approx((len(ids) - 3 - 4 * 59) / (len(ids) - 3))
    assert found.grade == "none"
    # Two fixed sentences in no order: almost all 4-grams are known.
    choices = np.random.default_rng(3).integers(0, 2, 30)
    ids = prose(20) + [token for choice in choices for token in range(10 * choice, 10 * choice + 10)]
    found = measure_repetition(ids)
    assert found.grade == "degenerate"
    assert found.onset is not None
    # Both sentences have been said once by the fifth, whatever the draw.
    assert 30 <= found.onset <= 70


def test_it_is_json():
    found = measure_repetition([5] * 20).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["loop"] == {"start": 0, "end": 20, "period": 1, "copies": 20.0}


def by_the_book(ids: list[int]) -> tuple[int, int]:
    """Tokens and period of the longest end of two copies at least, by trying all."""
    best = (0, 0)
    for period in range(1, len(ids) // 2 + 1):
        covered = period
        while covered < len(ids) and ids[-1 - covered] == ids[-1 - covered + period]:
            covered += 1
        if covered >= 2 * period and covered > best[0]:
            best = (covered, period)
    return best


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).flatmap(
    lambda piece: st.integers(1, 4).map(lambda times: piece * times)), max_size=6))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_end_is_measured_by_the_book(pieces):
    ids = [token for piece in pieces for token in piece]
    found = measure_repetition(ids)
    covered, period = by_the_book(ids)
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    assert found.distinct_share == pytest.approx(len(set(grams)) / len(grams) if grams else 1.0)
    if covered:
        assert found.loop is not None
        assert (found.loop.tokens, found.loop.period, found.loop.end) == (covered, period, len(ids))
    if found.onset is not None:
        assert 0 <= found.onset < len(ids)


COMPLETIONS = json.loads((Path(__file__).parent / "data" / "completions.json").read_text(encoding="utf-8"))
# Grade, onset, the gate's rule, whether it may be wrong; judged by reading the texts.
JUDGED = {
    # A function and a main that prints it.
    "fib": ("none", None, None, False),
    # "4.", then the same question about another operation again and again: nothing that the gate sees.
    "answer": ("mild", 17, None, False),
    # The prompt is the story's loop already, and goes on to the end.
    "ns": ("degenerate", 2, "fragment", False),
    # great-great-great-… within a sentence, and then the sentence again.
    "poem": ("degenerate", 102, "fragment", False),
    # Sound code, whose indentation the gate takes for gibberish.
    "hi": ("none", None, "fragment", True),
}


@pytest.mark.parametrize("completion", COMPLETIONS["completions"], ids=lambda completion: completion["name"])
def test_real_completions_beside_the_gate(completion):
    found, verdict = measure_repetition(completion["ids"]), judge_text(completion["text"])
    judged = (found.grade, found.onset, verdict.rule, verdict.false_positive_risk is not None)
    assert judged == JUDGED[completion["name"]]
