"""Generation one by one and many at once: the same tokens, the same ends, and refusals in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor

from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2 import PRESETS
from aprjax.qwen2 import batch as batching
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.generate import Stop, generate, generate_greedy
from aprjax.qwen2.model import Qwen2
from aprjax.qwen2.sampling import Sampling

PROMPTS = [[5, 17, 300], [41, 99, 3, 250, 12, 7, 5], [256], [5, 17, 300, 5, 256, 41, 99, 3], [7, 7]]
BUDGET = 6


@pytest.fixture(scope="module")
def model() -> Qwen2:
    return Qwen2(tiny_checkpoint())


@pytest.fixture(scope="module")
def alone(model: Qwen2) -> list[list[int]]:
    return [generate_greedy(model, prompt, max_new_tokens=BUDGET) for prompt in PROMPTS]


def test_together_they_continue_as_each_alone(model: Qwen2, alone: list[list[int]]) -> None:
    told: list[tuple[int, int]] = []
    together = generate_batch(model, PROMPTS, max_new_tokens=BUDGET, on_step=lambda *now: told.append(now))
    assert together == alone
    total = len(PROMPTS) * BUDGET
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_each_ends_at_its_own_stop_token(model: Qwen2, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    stops = frozenset((alone[0][1], alone[3][3]))

    def cut(tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in stops]
        return tokens[: ends[0] + 1] if ends else tokens

    expected = [cut(tokens) for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1
    told: list[int] = []
    run = {"max_new_tokens": BUDGET, "stop_ids": stops, "on_step": lambda done, total: told.append(done)}
    assert generate_batch(model, PROMPTS, **run) == expected
    assert told[-1] == len(PROMPTS) * BUDGET
    # Rows that have ended are given up at once: those that go on move together.
    monkeypatch.setattr(batching, "SHRINK", 1)
    assert generate_batch(model, PROMPTS, **run) == expected


def test_little_memory_means_more_waves_and_the_same_tokens(
    model: Qwen2, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_CACHE_BYTES", 1)
    waves = list(batching._waves(model, PROMPTS, BUDGET))
    assert sorted(index for wave in waves for index in wave) == list(range(len(PROMPTS)))
    assert {len(wave) for wave in waves} == {1}
    monkeypatch.setattr(batching, "MOST_CACHE_BYTES", 1 << 30)
    monkeypatch.setattr(batching, "MOST_PREFILL_POSITIONS", 8)
    assert generate_batch(model, PROMPTS, max_new_tokens=BUDGET) == alone


def test_nothing_to_do(model: Qwen2) -> None:
    assert generate_batch(model, [], max_new_tokens=3) == []
    assert generate_batch(model, [[1], [2]], max_new_tokens=0) == [[], []]
    with pytest.raises(CheckpointError, match="no tokens"):
        generate_batch(model, [[1], []], max_new_tokens=1)


def test_a_generation_says_why_it_ended(model: Qwen2, alone: list[list[int]]) -> None:
    generation = generate(model, PROMPTS[1], max_new_tokens=3)
    steps = iter(generation)
    assert next(steps) == alone[1][0]
    assert (generation.tokens, generation.stop) == (alone[1][:1], None)
    assert [*generation] == alone[1][1:3]
    assert generation.stop is Stop.BUDGET
    stopped = generate(model, PROMPTS[1], max_new_tokens=BUDGET, stop_ids=frozenset({alone[1][1]}))
    assert [*stopped] == alone[1][: alone[1].index(alone[1][1]) + 1]
    assert stopped.stop is Stop.TOKEN


def test_the_context_is_never_overrun(model: Qwen2, alone: list[list[int]]) -> None:
    short = Qwen2(replace(model.checkpoint, config=replace(CONFIG, max_position_embeddings=10)))
    generation = generate(short, PROMPTS[1], max_new_tokens=BUDGET)
    assert [*generation] == alone[1][:3]
    assert generation.stop is Stop.CONTEXT
    together = generate_batch(short, PROMPTS, max_new_tokens=BUDGET)
    assert together == [tokens[: 10 - len(prompt)] for prompt, tokens in zip(PROMPTS, alone, strict=True)]
    with pytest.raises(CheckpointError, match="10 tokens, expected fewer than the context's 10"):
        generate(short, [1] * 10, max_new_tokens=1)
    with pytest.raises(CheckpointError, match="the prompt has no tokens"):
        generate(short, [], max_new_tokens=1)


def test_sampling_follows_its_seed_and_top_k_of_one_is_greedy(model: Qwen2, alone: list[list[int]]) -> None:
    def drawn(seed: int, top_k: int = 0) -> list[int]:
        sampling = Sampling(temperature=3.0, top_k=top_k, seed=seed)
        return [*generate(model, PROMPTS[1], max_new_tokens=BUDGET, sampling=sampling)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, top_k=1) == alone[1]
    generation = generate(model, PROMPTS[1], max_new_tokens=BUDGET, sampling=Sampling(temperature=3.0))
    assert drawn(generation.seed) == [*generation]


def test_logits_that_are_no_numbers_are_refused(model: Qwen2) -> None:
    weight = np.array(model.checkpoint.tensors["model.norm.weight"].decode())
    weight[3] = np.nan
    broken = Qwen2(with_tensor(model.checkpoint, "model.norm.weight", weight))
    with pytest.raises(CheckpointError, match="not finite"):
        generate_greedy(broken, PROMPTS[1], max_new_tokens=2)
    with pytest.raises(CheckpointError, match="not finite"):
        generate_batch(broken, PROMPTS, max_new_tokens=2)


def test_double_precision_batches_likewise() -> None:
    model = Qwen2(tiny_checkpoint(replace(CONFIG, num_layers=1)), PRESETS["float64"])
    prompts = PROMPTS[:2]
    expected = [generate_greedy(model, prompt, max_new_tokens=3) for prompt in prompts]
    assert generate_batch(model, prompts, max_new_tokens=3) == expected
