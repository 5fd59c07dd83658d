"""llama.cpp as a side that generates: its greedy tokens, the same along a given continuation, errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny import VOCABULARY, tiny_checkpoint, write_tiny

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import CheckpointError
from aprjax.text import Tokenizer
from aprjax.trace.generation import Generated, Stop
from aprjax.trace.llama_cpp import LlamaOptions
from aprjax.trace.llama_cpp_generate import LlamaRuns, generate_llama_cpp, score_llama_cpp

PROMPTS = [[5, 17, 40, 5, 90, 3, 7, 8, 11], [250]]
NEW = 12


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_tiny(folder / "tiny.apr", tiny_checkpoint(types={"": "Q4_K", "down": "Q6_K"}))
    convert(folder / "tiny.apr", folder / "tiny.gguf", keep_blocks=True)
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def started(llama_cpp: ModuleType, gguf: Path) -> LlamaRuns:
    return generate_llama_cpp(gguf, PROMPTS, max_new_tokens=NEW, ignore_stop=True)


@pytest.fixture(scope="module")
def runs(started: LlamaRuns) -> list[Generated]:
    return list(started.runs)


@pytest.fixture
def llama(llama_cpp: ModuleType, gguf: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(
        str(gguf), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    yield model
    model.close()


@pytest.mark.llama_cpp
def test_it_is_the_greedy_decoding_of_the_public_interface(runs: list[Generated], llama: Any) -> None:
    for prompt, run in zip(PROMPTS, runs, strict=True):
        llama.reset()
        llama.eval(prompt)
        expected = []
        for step in range(NEW):
            row = np.array(llama.scores[llama.n_tokens - 1], np.float32)
            expected.append(int(row.argmax()))
            assert np.array_equal(run.likeliest.logits[step], np.sort(row)[::-1][:10])
            llama.eval(expected[-1:])
        assert list(run.tokens) == run.likeliest.best == expected
        assert run.stop is Stop.BUDGET
        assert run.likeliest.finite.all()
    # A prompt of one token is a step like the others.
    assert [(run.passes.batched, run.passes.steps, run.passes.tokens) for run in runs] == [(1, 11, 20), (0, 12, 12)]


@pytest.mark.llama_cpp
def test_along_a_given_continuation_it_says_the_same_to_the_bit(runs: list[Generated], gguf: Path) -> None:
    other = (*runs[0].tokens[:4], 3, *runs[0].tokens[5:])
    asked = [(prompt, run.tokens) for prompt, run in zip(PROMPTS, runs, strict=True)] + [(PROMPTS[0], other)]
    *same, changed = score_llama_cpp(gguf, asked, options=LlamaOptions(threads=1, step=7)).runs
    for run, scored in zip(runs, same, strict=True):
        assert np.array_equal(scored.likeliest.ids, run.likeliest.ids)
        assert np.array_equal(scored.likeliest.logits.view(np.int32), run.likeliest.logits.view(np.int32))
        assert np.array_equal(scored.logits, run.likeliest.logits[:, 0])
        assert set(scored.ranks) == {1}
    assert changed.first_difference(other) == 4
    assert changed.ranks[4] > 1
    assert changed.logits[4] < changed.likeliest.logits[4, 0]
    assert changed.passes.batched == 3  # 20 tokens in batches of 7


@pytest.mark.llama_cpp
def test_it_stops_where_llama_cpp_ends_an_answer(llama_cpp: ModuleType, runs: list[Generated], tmp_path: Path) -> None:
    third = runs[0].tokens[2]
    vocabulary = replace(VOCABULARY, eos_token_id=third)
    write_tiny(tmp_path / "tiny.apr", tiny_checkpoint(types={"": "Q4_K", "down": "Q6_K"}), vocabulary=vocabulary)
    convert(tmp_path / "tiny.apr", tmp_path / "tiny.gguf", keep_blocks=True)
    assert third in Tokenizer.from_checkpoint(open_checkpoint(tmp_path / "tiny.gguf")).stop_ids
    (stopped,) = generate_llama_cpp(tmp_path / "tiny.gguf", PROMPTS[:1], max_new_tokens=NEW).runs
    assert stopped.tokens == runs[0].tokens[: runs[0].tokens.index(third) + 1]
    assert stopped.stop is Stop.TOKEN


@pytest.mark.llama_cpp
def test_what_ran_is_recorded(started: LlamaRuns) -> None:
    engine = started.engine
    assert engine["ggml_version"] == "0.25.3"
    assert (engine["type_k"], engine["tiled"], engine["flash_attention"]) == ("f32", "False", "False")
    assert len(engine["ggml_cpu_sha256"]) == 64
    assert started.load_seconds > 0


def test_what_it_cannot_be_fed_is_refused(gguf: Path) -> None:
    for prompts in ([[]], [[5], [10**6]]):
        with pytest.raises(CheckpointError, match="token ids from 0"):
            generate_llama_cpp(gguf, prompts, max_new_tokens=1)
    with pytest.raises(CheckpointError, match="expected a GGUF file"):
        generate_llama_cpp(gguf.with_name("tiny.apr"), [[5]], max_new_tokens=1)
