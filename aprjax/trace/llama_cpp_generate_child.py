"""Generates with llama.cpp, in a process of its own. Started by `aprjax.trace.llama_cpp_generate`.

Protocol as in `llama_cpp_child`, but for what comes out: arrays in the file that the request names, and among
them the rest as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.trace.generation import Likeliest, Passes, Stop, likeliest, rank_of
from aprjax.trace.llama_cpp_child import decode, engine_context, load_engine, serve

# llama.cpp's own default for the tokens of one graph (`n_ubatch`), within which the logits' buffer stays small.
_BATCH = 512


class _Engine:
    """A loaded model, its context, and what was fed to it since the last prompt.

    Attributes:
        passes: since the last prompt.
    """

    def __init__(self, llama_cpp: Any, model: Any, context: Any, batch: int) -> None:
        self._llama_cpp, self._context, self._batch = llama_cpp, context, batch
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._width = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._length = 0
        self.passes = Passes()

    def forget(self) -> None:
        """Empties the cache."""
        self._llama_cpp.llama_memory_clear(self._llama_cpp.llama_get_memory(self._context), True)
        self._length, self.passes = 0, Passes()

    def feed(self, tokens: list[int], *, outputs: int) -> Iterator[np.ndarray]:
        """Feeds tokens after those before; yields the logits after each of the last `outputs` of them."""
        silent = len(tokens) - outputs
        for begin in range(0, len(tokens), self._batch):
            part = tokens[begin : begin + self._batch]
            first = min(max(0, silent - begin), len(part))
            start = time.perf_counter()
            code = decode(self._llama_cpp, self._context, part, self._length, first_output=first)
            if code != 0:
                raise RuntimeError(f"llama_decode failed with code {code}")
            self._length += len(part)
            # Reading waits for the computation.
            rows = [self._logits(row) for row in range(first, len(part))]
            single = len(part) == 1
            self.passes += Passes(int(not single), int(single), len(part), time.perf_counter() - start)
            yield from rows

    def _logits(self, row: int) -> np.ndarray:
        """A copy of one row of the last batch: the next batch writes over it."""
        address = self._llama_cpp.llama_get_logits_ith(self._context, row)
        if not address:
            raise RuntimeError(f"llama.cpp has no logits for row {row} of the batch")
        return np.ctypeslib.as_array(address, shape=(self._width,)).copy()

    def ends(self, token: int) -> bool:
        """Whether llama.cpp ends generation at this token."""
        return bool(self._llama_cpp.llama_vocab_is_eog(self._vocabulary, token))


def _run(request: dict[str, Any]) -> None:
    llama_cpp, _, facts = load_engine()
    jobs, options = request["jobs"], request["options"]
    lengths = [len(job["prompt"]) + len(job["given"] or ()) + job["max_new_tokens"] for job in jobs]
    longest_batch = max(len(job["prompt"]) + len(job["given"] or ()) for job in jobs)
    batch = min(options["step"] or _BATCH, longest_batch)
    arrays: dict[str, np.ndarray] = {}
    said: list[dict[str, Any]] = []
    start = time.perf_counter()
    with engine_context(llama_cpp, Path(request["path"]), options, count=max(lengths), step=batch) as (model, context):
        loaded = time.perf_counter() - start
        engine = _Engine(llama_cpp, model, context, batch)
        for index, job in enumerate(jobs):
            engine.forget()
            run = _generate if job["given"] is None else _score
            answer, found = run(engine, job)
            arrays |= {f"{index}.{name}": values for name, values in found.items()}
            said.append({**answer, "passes": vars(engine.passes)})
    answer = {"jobs": said, "engine": facts, "load_seconds": loaded}
    arrays["answer"] = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    with Path(request["target"]).open("wb") as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType] - the stub takes the names for options


def _arrays(found: Likeliest) -> dict[str, np.ndarray]:
    return {"ids": found.ids, "logits": found.logits, "finite": found.finite}


def _generate(engine: _Engine, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tokens: list[int] = []
    rows: list[tuple[np.ndarray, np.ndarray, bool]] = []
    feed, stop = job["prompt"], Stop.BUDGET
    while len(tokens) < job["max_new_tokens"]:
        (logits,) = engine.feed(feed, outputs=1)
        rows.append(likeliest(logits))
        feed = [int(rows[-1][0][0])]
        tokens += feed
        if not job["ignore_stop"] and engine.ends(feed[0]):
            stop = Stop.TOKEN
            break
    return {"tokens": tokens, "stop": str(stop)}, _arrays(Likeliest.of_rows(rows))


def _score(engine: _Engine, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    given = job["given"]
    rows, logits, ranks = [], [], []
    # The last given token is not fed: nothing is asked about what follows it.
    fed = engine.feed([*job["prompt"], *given[:-1]], outputs=len(given))
    for token, row in zip(given, fed, strict=True):
        rows.append(likeliest(row))
        logits.append(row[token])
        ranks.append(rank_of(row, token))
    found = {"given_logits": np.array(logits, np.float32), "given_ranks": np.array(ranks, np.int32)}
    return {}, {**_arrays(Likeliest.of_rows(rows)), **found}


if __name__ == "__main__":
    sys.exit(serve(_run))
