"""llama.cpp as a peer: a process that computes when it is told to, so that two engines take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from measured import PLAIN_LLAMA, cores

# A line in, a line out: [tokens, how many to decode after them] -> [[wall, processor] of the prefill, of the decoding,
# the tokens that were decoded]. float32 cache and no flash attention, as the preset `llama.cpp`.
_PROGRAM = """
import json, sys, time
import llama_cpp, numpy as np
path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llama = llama_cpp.Llama(
    path, n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads,
    flash_attn=False, type_k=0, type_v=0, logits_all=sys.argv[4] == "all", verbose=False,
)
def now():
    return np.array([time.perf_counter(), time.process_time()])
for line in sys.stdin:
    tokens, count = json.loads(line)
    llama.reset()
    start = now()
    llama.eval(tokens)
    fed = now()
    found = []
    while len(found) < count:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
        found.append(int(logits.argmax()))
        if len(found) < count:
            llama.eval(found[-1:])
    print(json.dumps([list(fed - start), list(now() - fed), found]), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """Wall and processor seconds of feeding tokens at once, and of decoding after them; the decoded tokens."""

    prefill: tuple[float, float]
    decode: tuple[float, float]
    tokens: list[int]


class Llama:
    """A model in llama.cpp, loaded once.

    Args:
        path: the GGUF file.
        context: the most tokens.
        threads: as many as there are cores by default.
        all_logits: compute every position's logits, as a forward pass here does, and not only the last one's.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None, *, all_logits: bool = True) -> None:
        arguments = [str(path), str(context), str(threads or cores()), "all" if all_logits else "last"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **PLAIN_LLAMA},
            text=True,
        )

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate()

    def run(self, tokens: Sequence[int], count: int = 0) -> Answer:
        """Feeds tokens, and decodes `count` greedily; its first is the prefill's, and is not timed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(tokens), count]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp exited with {self._process.wait()}")
        prefill, decode, found = json.loads(line)
        return Answer(tuple(prefill), tuple(decode), found)
