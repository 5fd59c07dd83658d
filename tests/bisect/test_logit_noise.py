"""The noise floor of a logit: what sigma stands for, and that the changes change rounding and nothing else."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint, with_tensor

from aprjax.bisect.lockstep import Runner, arbiter
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.changed_runs import (
    AS_IT_IS,
    DOUBLE,
    PERMUTED,
    REASSOCIATED,
    STEPWISE,
    Variant,
    reordered,
    sweep,
    variants,
)
from aprjax.bisect.noise.logits import (
    PLAUSIBLE,
    LogitNoise,
    _ChangeSums,
    measure_logit_noise,
    plausible_tokens,
    same_types,
)
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.generate import Cache, extend
from aprjax.qwen2.model import Qwen2, bucket, run_head, run_norm

TOKENS = [5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7]
# The same program as that of the change to float64 sums: a name of its own would compile it again.
FLOAT64 = arbiter(PRESETS["float32"])
PLAIN = tiny_checkpoint()


def noise(checkpoint: Checkpoint, name: str, **options) -> LogitNoise:
    return measure_logit_noise(Runner(checkpoint, PRESETS[name]), None, TOKENS, **options)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_plausible_tokens_are_those_of_a_full_sort(rows: list[list[int]], count: int) -> None:
    logits = np.array(rows, np.float32)
    found = plausible_tokens(logits, count)
    for row, chosen in zip(rows, found, strict=True):
        by_logit = sorted(range(7), key=lambda token: (-row[token], token))[:count]
        assert [row[token] for token in chosen] == [row[token] for token in by_logit]
        assert chosen[0] == int(np.argmax(row))


def test_sigma_is_the_gaps_own() -> None:
    """The mean square change of a gap is exactly twice sigma's square, whatever the logits' correlation."""
    generator = np.random.default_rng(3)
    base = generator.normal(0, 5, (6, 40)).astype(np.float32)
    common = generator.normal(0, 1, (6, 1))
    changed = (base + common + generator.normal(0, 0.1, base.shape)).astype(np.float32)
    sums = _ChangeSums()
    sums.add(base[:2], changed[:2])
    sums.add(base[2:], changed[2:])
    report = sums.report("ref", "test", "test")
    delta = changed.astype(np.float64) - base
    squares = [
        (delta[row, a] - delta[row, b]) ** 2
        for row in range(6)
        for a, b in combinations(np.argsort(-base[row])[:PLAUSIBLE], 2)
    ]
    assert report.sigma == pytest.approx(np.sqrt(np.mean(squares) / 2))
    # The common shift, ten times the rest, moves no gap.
    assert 0.05 < report.sigma < 0.2
    assert report.positions == 6


def test_a_shift_of_all_logits_is_no_noise() -> None:
    sums = _ChangeSums()
    base = np.arange(24, dtype=np.float32).reshape(2, 12)
    sums.add(base, base + np.float32(8))
    report = sums.report("ref", "test", "test")
    assert (report.sigma, report.sigma_vocabulary, report.sigma_top2, report.flips) == (0.0, 0.0, 0.0, 0)


def test_neurons_in_another_order_are_the_same_function() -> None:
    """In double precision nothing is left of the change; in float32 the last bits of it are."""
    distances = {}
    for arithmetic in (FLOAT64, PRESETS["float32"]):
        runner = Runner(PLAIN, arithmetic)
        ways, skipped = variants(runner, 0)
        assert not skipped
        plain, permuted = (way for way in ways if way.name in (AS_IT_IS, PERMUTED))
        assert sorted(permuted.order or ()) == list(range(512))
        base, changed = sweep(runner, TOKENS, [plain, permuted], lambda done, total: None)
        distances[arithmetic.dtype] = float(np.abs(changed - base).max() / np.abs(base).max())
    assert 0 < distances["float64"] < 1e-14
    assert 1e-9 < distances["float32"] < 1e-5


def test_whole_blocks_move_with_their_neurons() -> None:
    """Nothing is encoded again: gate and up lose no row, down no column, and each block stays as it was."""
    checkpoint = tiny_checkpoint(types={"": "Q8_0"})
    order = (variants(Runner(checkpoint, PRESETS["llama.cpp"]), 0)[0][1]).order
    assert order is not None
    moved = reordered(checkpoint, 1, order)
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        expected = np.take(checkpoint.tensors[name].decode(), order, axis=axis)
        np.testing.assert_array_equal(moved[part].decode(), expected)
    # Blocks of 32 stay together, of weights and of the activations that they meet.
    assert [order[at : at + 32] for at in range(0, 512, 32)] == [
        tuple(range(order[at], order[at] + 32)) for at in range(0, 512, 32)
    ]


def test_one_position_at_a_time_is_decoding() -> None:
    """The states of the last positions give the logits that a decoder with a cache gives."""
    runner = Runner(PLAIN, PRESETS["float32"])
    way = Variant(STEPWISE, runner.arithmetic, steps=3)
    hidden = sweep(runner, TOKENS, [way], lambda done, total: None)[0]
    model = Qwen2(PLAIN, runner.arithmetic)
    cache = Cache.empty(model.config, bucket(len(TOKENS)), "float32")
    _, cache = extend(model, TOKENS[:8], cache)
    for position in range(8, 11):
        expected, cache = extend(model, [TOKENS[position]], cache)
        normed = run_norm(model.norm, hidden[position : position + 1], arithmetic=runner.arithmetic)
        logits = run_head(model.head, normed, arithmetic=runner.arithmetic)[0]
        np.testing.assert_allclose(np.asarray(logits), np.asarray(expected), atol=1e-5)


def test_rounding_is_all_that_decoded_arithmetic_makes_of_the_changes() -> None:
    floor = noise(PLAIN, "float32", steps=3)
    assert [change.change for change in floor.changes] == [PERMUTED, DOUBLE, STEPWISE]
    # Logits are of the order of one; a unit in the last place of float32 is 1e-7 of that.
    assert 1e-8 < floor.sigma < 1e-5
    assert floor.sigma == max(change.sigma for change in floor.changes)
    assert [change.positions for change in floor.changes] == [11, 11, 3]
    document = json.loads(json.dumps(floor.to_json(), allow_nan=False))
    assert document["near_tie_gap"] == pytest.approx(NEAR_TIE_SIGMAS * floor.sigma)
    assert document["positions"] == list(range(len(TOKENS)))


def test_both_sides_are_measured_where_they_are_not_of_one_kind() -> None:
    single, double = Runner(PLAIN, PRESETS["float32"]), Runner(PLAIN, FLOAT64)
    both = measure_logit_noise(double, single, TOKENS, [10], steps=0)
    assert [(change.side, change.change) for change in both.changes] == [
        ("ref", PERMUTED),
        ("ref", DOUBLE),
        ("model", PERMUTED),
    ]
    # A side without noise does not make the other's smaller.
    assert both.sigma == max(change.sigma for change in both.changes if change.side == "ref")
    alike = measure_logit_noise(double, double, TOKENS, [10], steps=0)
    assert {change.side for change in alike.changes} == {"ref"}
    assert same_types(PLAIN, PLAIN)
    assert not same_types(PLAIN, tiny_checkpoint(types={"down_proj": "Q8_0"}))


def test_changes_that_do_not_apply_are_named_or_replaced() -> None:
    coarse = tiny_checkpoint(types={"": "Q8_0", "down_proj": "Q4_K"})
    ways, skipped = variants(Runner(coarse, PRESETS["llama.cpp"]), 4)
    assert [way.name for way in ways] == [AS_IT_IS, DOUBLE, STEPWISE]
    assert skipped == [f"{PERMUTED}: the rows of down_proj have too few whole blocks"]
    blocks = tiny_checkpoint(types={"": "Q8_0"})
    ways, skipped = variants(Runner(blocks, PRESETS["llama.cpp-exact"]), 0)
    assert [way.name for way in ways] == [AS_IT_IS, REASSOCIATED, DOUBLE]
    assert not ways[1].arithmetic.exact
    # realizar quantizes 256 activations together: 512 neurons have no third group.
    assert variants(Runner(blocks, PRESETS["realizar"]), 0)[1]
    assert [way.name for way in variants(Runner(PLAIN, PRESETS["float64"]), 0)[0]] == [AS_IT_IS, PERMUTED]


def test_near_ties_are_within_reach_and_second_best() -> None:
    floor = LogitNoise(0.1, (), (0,))
    assert floor.near_tie_gap == pytest.approx(0.4243, abs=1e-4)
    assert floor.is_near_tie(0.42, 2)
    assert not floor.is_near_tie(0.43, 2)
    assert not floor.is_near_tie(0.1, 3)
    assert floor.in_sigmas(0.2) == pytest.approx(2.0)
    silent = LogitNoise(0.0, (), (0,))
    assert silent.in_sigmas(0.0) == 0.0
    assert silent.in_sigmas(1.0) is None
    assert not silent.is_near_tie(1e-9, 2)


def test_positions_and_tokens_are_checked() -> None:
    for positions in ([], [11], [-1]):
        with pytest.raises(ValueError, match="11 tokens"):
            noise(PLAIN, "float32", positions=positions)
    with pytest.raises(CheckpointError, match="999999"):
        measure_logit_noise(Runner(PLAIN, PRESETS["float32"]), None, [1, 999999])


def test_a_model_whose_logits_are_not_finite_has_no_noise() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    values = PLAIN.tensors[name].decode()
    values[3, 9] = np.nan
    measured = noise(with_tensor(PLAIN, name, values), "float32", steps=0)
    assert measured.sigma == 0.0
    assert measured.changes == ()
