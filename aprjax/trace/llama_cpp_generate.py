"""llama.cpp as a side that generates: greedy continuations, and the likeliest tokens along a given one.

It runs in a child process (`llama_cpp_generate_child`), which loads the model once for all prompts of a call.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.open import open_checkpoint
from aprjax.trace.engine import check_tokens
from aprjax.trace.generation import Generated, Likeliest, Passes, Scored, Stop
from aprjax.trace.llama_cpp import LlamaOptions, processors, require_llama_file, start_child


@dataclass(frozen=True)
class LlamaRuns:
    """What one start of llama.cpp yielded.

    Attributes:
        runs: one for each request, in order.
        engine: version, commit, features and options of what ran.
        load_seconds: what loading the model took.
    """

    runs: tuple[Any, ...]
    engine: dict[str, str]
    load_seconds: float


def generate_llama_cpp(
    path: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ignore_stop: bool = False,
    options: LlamaOptions | None = None,
) -> LlamaRuns:
    """The greedy continuation of each prompt: `runs` are `Generated`.

    Args:
        path: a GGUF file of the architecture qwen2.
        prompts: token ids, each fed from position 0 into an empty cache.
        max_new_tokens: how long a continuation may get; at least 1.
        ignore_stop: go on after tokens at which llama.cpp ends generation (`llama_vocab_is_eog`).
        options: how the engine is to run.

    Raises:
        EngineError: llama-cpp-python is absent, of another version or layout, or failed.
        CheckpointError: the file cannot be read, or has no such tokens.
    """
    jobs = [
        {"prompt": list(prompt), "given": None, "max_new_tokens": max_new_tokens, "ignore_stop": ignore_stop}
        for prompt in prompts
    ]
    return _run(path, jobs, options or LlamaOptions())


def score_llama_cpp(
    path: str | Path,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    options: LlamaOptions | None = None,
) -> LlamaRuns:
    """Feeds each (prompt, continuation) at once: `runs` are `Scored`.

    Raises:
        EngineError, CheckpointError: see `generate_llama_cpp`.
    """
    jobs = [
        {"prompt": list(prompt), "given": list(given), "max_new_tokens": 0, "ignore_stop": True}
        for prompt, given in prompts
    ]
    return _run(path, jobs, options or LlamaOptions())


def _run(path: str | Path, jobs: list[dict[str, Any]], options: LlamaOptions) -> LlamaRuns:
    checkpoint = open_checkpoint(path)
    require_llama_file(checkpoint)
    for job in jobs:
        check_tokens(checkpoint, [*job["prompt"], *(job["given"] or ())])
    threads = options.threads or processors()
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        target = Path(folder) / "runs.npz"
        request = {
            "path": str(path),
            "target": str(target),
            "options": {**asdict(options), "threads": threads},
            "jobs": jobs,
        }
        start_child("llama_cpp_generate_child", request, options, path)
        with np.load(target) as arrays:
            answer = json.loads(arrays["answer"].tobytes())
            runs = tuple(
                _scored(arrays, index, said) if job["given"] is not None else _generated(arrays, index, said)
                for index, (job, said) in enumerate(zip(jobs, answer["jobs"], strict=True))
            )
    chosen = {key: str(value) for key, value in {**asdict(options), "threads": threads}.items() if value is not None}
    return LlamaRuns(runs, {**chosen, **answer["engine"]}, answer["load_seconds"])


def _likeliest(arrays: Any, index: int) -> Likeliest:
    return Likeliest(arrays[f"{index}.ids"], arrays[f"{index}.logits"], arrays[f"{index}.finite"])


def _generated(arrays: Any, index: int, said: dict[str, Any]) -> Generated:
    return Generated(tuple(said["tokens"]), _likeliest(arrays, index), Stop(said["stop"]), Passes(**said["passes"]))


def _scored(arrays: Any, index: int, said: dict[str, Any]) -> Scored:
    return Scored(
        _likeliest(arrays, index),
        arrays[f"{index}.given_logits"],
        arrays[f"{index}.given_ranks"],
        Passes(**said["passes"]),
    )
