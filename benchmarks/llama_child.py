"""The process of a `llama.Llama`: loads a model once, then a line in, a line out. Started, never imported.

`[tokens, count]` → `[[wall, processor] of the prefill, of decoding `count` tokens after it, those tokens, bytes that
were captured]`. float32 cache and no flash attention, as the preset `llama.cpp`. It uses llama.cpp's C functions: the
logits stay where the engine has put them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.qwen2.stages import Stage
from aprjax.trace.ggml_nodes import StageMap, absent_stages, missing_stages, read_node, read_values
from aprjax.trace.llama_cpp_child import decode, engine_context, load_engine


class Capture:
    """The evaluation callback of an engine that only copies: every node that a stage is made from, as it stands.

    The first run looks at each node as aprjax's own capture does, and makes a plan: which of the nodes, in the order in
    which the engine asks, are copied, and where to. Every later run follows it, with a `memmove` for each wanted node
    into memory that is there already. No value is rearranged.
    """

    def __init__(self, base: Any, tokens: int, layers: int) -> None:
        self._base, self._layers = base, layers
        self.tokens = tokens
        self._plan: list[np.ndarray | None] = []
        self._place = 0
        self._planned = False
        self._found: set[tuple[int, Stage]] = set()
        self._stages = StageMap(tokens, tokens, lambda layer, stage, _: self._found.add((layer, stage)))
        self._target: np.ndarray | None = None
        self._failure: Exception | None = None

    @property
    def nbytes(self) -> int:
        """Of all copies."""
        return sum(target.nbytes for target in self._plan if target is not None)

    def __call__(self, address: int, ask: bool, _user: Any) -> bool:
        """Before a node is computed: is it wanted? After: its copy."""
        try:
            if not self._planned:
                return self._look(address, ask)
            if ask:
                self._target = self._plan[self._place]
                self._place += 1
                return self._target is not None
            assert self._target is not None
            ctypes.memmove(self._target.ctypes.data, self._base.ggml_get_data(address), self._target.nbytes)
        except Exception as error:  # must not cross into C
            self._failure = error
            return False
        return True

    def _look(self, address: int, ask: bool) -> bool:
        node = read_node(self._base, address)
        if ask:
            wanted = self._stages.wants(node)
            # Written once, so that its pages are there.
            self._plan.append(np.ones(self._base.ggml_nbytes(address), np.uint8) if wanted else None)
            return wanted
        self._stages.take(node, read_values(self._base, node))
        return True

    def finish(self) -> None:
        """After each run: that it went through, and that the first one found every stage that the engine has."""
        if self._failure is not None:
            raise self._failure
        if self._planned and self._place != len(self._plan):
            raise SystemExit(f"expected {len(self._plan)} nodes, was asked for {self._place}")
        if not self._planned:
            absent = absent_stages(flash_attention=False, stepwise=False)
            missing = list(missing_stages(self._layers, self._found, absent=absent))
            if missing:
                raise SystemExit(f"not in the engine's graph: {', '.join(missing)}")
        self._planned, self._place = True, 0


def main() -> None:
    options = json.loads(sys.argv[1])
    answers, os.environ["GGML_NO_BACKTRACE"] = os.fdopen(os.dup(1), "w"), "1"
    os.dup2(2, 1)  # what the library prints is no answer
    llama_cpp, base, _ = load_engine()
    capture = Capture(base, options["context"], options["layers"]) if options["capture"] else None
    callback = llama_cpp.ggml_backend_sched_eval_callback(capture) if capture else None
    size, path = options["context"], Path(options["path"])
    with engine_context(llama_cpp, path, options, count=size, step=size, callback=callback) as (model, context):
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def feed(tokens: list[int], start: int, first_output: int) -> None:
            code = decode(llama_cpp, context, tokens, start, first_output=first_output)
            if capture is not None:
                capture.finish()
            if code:
                raise SystemExit(f"llama_decode failed with code {code}")

        for line in sys.stdin:
            tokens, count = json.loads(line)
            if capture is not None and (len(tokens) != capture.tokens or count):
                raise SystemExit(f"this capture is of {capture.tokens} tokens at once")
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            start, found = now(), []
            feed(tokens, 0, 0 if options["all_logits"] else len(tokens) - 1)
            fed = now()
            while len(found) < count:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (width,))
                found.append(int(logits.argmax()))
                if len(found) < count:
                    feed(found[-1:], len(tokens) + len(found) - 1, 0)
            captured = capture.nbytes if capture else 0
            print(json.dumps([list(fed - start), list(now() - fed), found, captured]), file=answers, flush=True)


def now() -> np.ndarray:
    """Wall and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
