"""With `exact` the model is llama.cpp's plain build, to the bit: node by node, and free-running to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, write_tiny

import aprjax
from aprjax.bisect.traced import arithmetic_of
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Arithmetic, Stage
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import bucket, causal_context, embed_padded, run_head, run_layer, run_norm, trim
from aprjax.text import Tokenizer, wrap
from aprjax.trace.llama_cpp import LlamaOptions, run_llama_cpp

Key = tuple[int, Stage]
# "def fib(n):"
FOUR = [750, 15801, 1445, 1648]
PROGRAM = '''def mean(values: list[float]) -> float:
    """The arithmetic mean; raises ValueError for an empty list."""
    if not values:
        raise ValueError("mean of nothing")
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


print(mean([1.0, 2.0, 4.5]))  # 2.5
'''
TINY_TOKENS = [5, 17, 40, 5, 90, 3, 7, 8, 250, 12, 41]


def both_ways(
    checkpoint: Checkpoint, live: Mapping[Key, np.ndarray], tokens: list[int], arithmetic: Arithmetic, *, locally: bool
) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
    """Every node: its key, its free-running value, and (if asked for) its value from the engine's own inputs.

    Free-running goes through the padded bucket, the local one through exactly these tokens.
    """
    config, count = checkpoint.config, len(tokens)
    free = jnp.asarray(embed_padded(checkpoint, tokens, arithmetic))
    padded_context = causal_context(config, arithmetic, length=bucket(count, arithmetic))
    context = causal_context(config, arithmetic, length=count)
    theirs = live[OUTSIDE, Stage.EMBEDDING]
    yield (OUTSIDE, Stage.EMBEDDING), np.asarray(free[:count]), theirs
    for index in range(config.num_layers):
        layer = load_layer(checkpoint, index)
        free, _, values = run_layer(layer, free, padded_context, {}, {}, arithmetic=arithmetic, capture=True)
        given = {stage: jnp.asarray(live[index, stage]) for stage in LAYER_STAGES if (index, stage) in live}
        local = values = {stage: trim(stage, value, count) for stage, value in values.items()}
        if locally:
            _, _, local = run_layer(layer, jnp.asarray(theirs), context, given, {}, arithmetic=arithmetic, capture=True)
        for stage in given:
            yield (index, stage), np.asarray(values[stage]), np.asarray(local[stage])
        theirs = live[index, Stage.POST_FFN_RESIDUAL]
    norm, head = load_norm(checkpoint, "model.norm.weight"), pack(head_tensor(checkpoint))
    normed = run_norm(norm, free[:count], arithmetic=arithmetic)
    local_normed = run_norm(norm, jnp.asarray(theirs), arithmetic=arithmetic)
    yield (OUTSIDE, Stage.FINAL_NORM), np.asarray(normed), np.asarray(local_normed)
    given_normed = jnp.asarray(live[OUTSIDE, Stage.FINAL_NORM])
    logits, local_logits = (run_head(head, x, arithmetic=arithmetic) for x in (normed, given_normed))
    yield (OUTSIDE, Stage.LM_HEAD), np.asarray(logits), np.asarray(local_logits)


def mismatches(
    path: Path, tokens: list[int], options: LlamaOptions | None = None, *, locally: bool = True
) -> tuple[dict[Key, tuple[int, int]], set[Key], Arithmetic]:
    """Per node that is not the engine's: elements that differ free-running and locally; all nodes; the arithmetic."""
    trace = run_llama_cpp(path, tokens, options)
    live, arithmetic = trace.values, arithmetic_of(trace)
    assert arithmetic is not None
    found, compared = {}, set()
    for key, free, local in both_ways(aprjax.open(path), live, tokens, arithmetic, locally=locally):
        compared.add(key)
        assert free.shape == local.shape == live[key].shape, key
        counts = tuple(int((value.view(np.int32) != live[key].view(np.int32)).sum()) for value in (free, local))
        if any(counts):
            found[key] = counts
    assert compared == set(live)
    return found, compared, arithmetic


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of matrix that has its own arithmetic: with minimums, without, and plain floats."""
    folder = tmp_path_factory.mktemp("exact")
    types = {"": "Q4_K", "down": "Q6_K", "k_proj": "F16", "v_proj": "F32"}
    checkpoint = tiny_checkpoint(replace(CONFIG, num_layers=1), types=types)
    write_tiny(folder / "tiny.apr", checkpoint)
    convert(folder / "tiny.apr", folder / "tiny.gguf", keep_blocks=True)
    return folder / "tiny.gguf"


@pytest.mark.llama_cpp
def test_a_tiny_model_is_the_engines(llama_cpp: ModuleType, tiny_gguf: Path) -> None:
    found, compared, arithmetic = mismatches(tiny_gguf, TINY_TOKENS, locally=False)
    assert arithmetic == PRESETS["llama.cpp-exact"]
    assert found == {}
    assert (0, Stage.ATTN_SOFTMAX) in compared


@pytest.mark.llama_cpp
def test_a_tiny_model_is_the_default_builds(
    llama_cpp: ModuleType, llama_build: Callable[[str], Path], tiny_gguf: Path
) -> None:
    """Eight rows that are multiplied by fours, and three alone; tiles; tinyBLAS."""
    options = LlamaOptions(tiled=True, repack=True, library=str(llama_build("avx2")))
    found, _, arithmetic = mismatches(tiny_gguf, TINY_TOKENS, options, locally=False)
    assert arithmetic == PRESETS["llama.cpp-default"]
    assert found == {}


@pytest.mark.real_model
@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("model", "prompt", "kv_cache"),
    [
        ("qwen2.5-coder-0.5b", "four", "f32"),
        ("qwen2.5-coder-0.5b", "program", "f32"),
        ("qwen2.5-coder-0.5b", "four", "f16"),
        ("qwen2.5-coder-1.5b", "chat", "f32"),
    ],
)
def test_every_node_and_the_logits_are_the_engines(
    llama_cpp: ModuleType,
    model_path: Callable[[str], Path],
    model: str,
    prompt: str,
    kv_cache: Literal["f32", "f16"],
) -> None:
    path = model_path(model)
    if prompt == "four":
        tokens = FOUR
    else:
        tokenizer = Tokenizer.from_checkpoint(aprjax.open(path))
        text = PROGRAM if prompt == "program" else wrap("What is 2+2?", "once")
        tokens = tokenizer.encode(text)[:79]
    assert len(tokens) == {"four": 4, "program": 79, "chat": 15}[prompt]
    # Where every free-running node is the engine's, its inputs are, too: the local values are those. They are
    # computed apart once for each model, because that is another program.
    options = LlamaOptions(type_k=kv_cache, type_v=kv_cache)
    found, _, _ = mismatches(path, tokens, options, locally=prompt != "program" and kv_cache == "f32")
    assert found == {}
