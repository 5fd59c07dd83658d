"""Sampling against llama.cpp's own samplers and transformers' filters, and against its own definition."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aprjax.qwen2.sampling import GREEDY, Sampler, Sampling, candidates

LOGITS = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    seed=st.just(0),
)


def random_logits(seed: int, count: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, count).astype(np.float32)


@given(LOGITS, SETTINGS)
def test_candidates_are_the_likeliest_in_order_and_sum_to_one(logits: np.ndarray, sampling: Sampling) -> None:
    ids, probabilities = candidates(logits, sampling)
    assert 1 <= len(ids) <= min(sampling.top_k or logits.size, logits.size)
    # By logit, the lower id first among equals: exactly a prefix of that order.
    order = sorted(range(logits.size), key=lambda token: (-logits[token], token))
    assert ids.tolist() == order[: len(ids)]
    assert probabilities.sum() == pytest.approx(1)
    assert (np.diff(probabilities) <= 0).all()


@given(LOGITS)
def test_without_cuts_it_is_the_models_distribution(logits: np.ndarray) -> None:
    ids, probabilities = candidates(logits, Sampling(temperature=1.0))
    expected = np.exp(logits.astype(np.float64))
    assert sorted(ids.tolist()) == list(range(logits.size))
    np.testing.assert_allclose(probabilities, (expected / expected.sum())[ids], rtol=1e-9)


@given(LOGITS)
def test_temperature_zero_is_greedy_whatever_else_is_asked(logits: np.ndarray) -> None:
    assert Sampler(Sampling(0.0, top_k=5, top_p=0.5, seed=3)).choose(logits) == int(np.argmax(logits))
    assert Sampler(GREEDY).choose(logits) == int(np.argmax(logits))


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.5, seed=seed))
        return [sampler.choose(random_logits(step)) for step in range(30)]

    # Recorded: a change of the generator or of the order would change every run that was published with its seed.
    assert drawn(7)[:5] == [783, 543, 920, 940, 124]
    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits, sampler, count = random_logits(1, 12), Sampler(Sampling(0.8, top_k=8, top_p=0.95, seed=1)), 4000
    ids, probabilities = candidates(logits, sampler.sampling)
    drawn = np.bincount([sampler.choose(logits) for _ in range(count)], minlength=12)[ids] / count
    # Five standard deviations of a frequency.
    assert (np.abs(drawn - probabilities) < 5 * np.sqrt(probabilities * (1 - probabilities) / count) + 1e-12).all()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1.0, np.inf, np.nan)),
        *({"top_p": value} for value in (0.0, 1.5, np.nan)),
        *({"top_k": -1}, {"seed": -1}),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Sampling(**wrong)


def llama_candidates(llama_cpp: ModuleType, logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """What llama.cpp's samplers keep, in the order of its default chain, and the probabilities it draws with."""
    data = (llama_cpp.llama_token_data * logits.size)()
    for token, logit in enumerate(logits):
        data[token].id, data[token].logit = token, logit
    array = llama_cpp.llama_token_data_array(data=data, size=logits.size, selected=-1, sorted=False)
    makers: list[Callable[[], Any]] = [
        lambda: llama_cpp.llama_sampler_init_top_k(sampling.top_k),
        lambda: llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
        lambda: llama_cpp.llama_sampler_init_temp(sampling.temperature),
        lambda: llama_cpp.llama_sampler_init_dist(0),
    ]
    for make in makers:
        sampler = make()
        llama_cpp.llama_sampler_apply(sampler, array)
        llama_cpp.llama_sampler_free(sampler)
    return {array.data[index].id: array.data[index].p for index in range(array.size)}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("top_k", [0, 1, 40, 2000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_cuts_and_probabilities_are_llama_cpps(
    llama_cpp: ModuleType, top_k: int, top_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    logits = random_logits(5)
    theirs = llama_candidates(llama_cpp, logits, sampling)
    ids, probabilities = candidates(logits, sampling)
    assert set(ids.tolist()) == set(theirs)
    # Theirs are float32.
    np.testing.assert_allclose(probabilities, [theirs[token] for token in ids.tolist()], rtol=1e-4, atol=1e-9)


@pytest.mark.transformers_peer
@pytest.mark.parametrize("top_k", [1, 40, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.9])
def test_at_temperature_one_the_cuts_are_transformers_too(transformers: ModuleType, top_k: int, top_p: float) -> None:
    import torch
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(6)
    # The filters look at the scores alone.
    tokens = torch.LongTensor([[]])
    scores = TopKLogitsWarper(top_k)(tokens, torch.FloatTensor(logits[None]))
    scores = TopPLogitsWarper(top_p)(tokens, scores)
    theirs = torch.softmax(scores[0].double(), dim=-1).numpy()
    ids, probabilities = candidates(logits, Sampling(1.0, top_k, top_p))
    assert set(ids.tolist()) == set(np.flatnonzero(theirs).tolist())
    np.testing.assert_allclose(probabilities, theirs[ids], rtol=1e-9)
