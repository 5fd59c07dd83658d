"""Decoding speed against llama.cpp on the same file, alone and many sequences at once.

    python benchmarks/bench_generate.py [--model qwen2.5-coder-0.5b] [--tokens 64] [--repeats 3] [--pair]

Both decode greedily after the same prompt, in turns within one run, with as many threads as there are cores. llama.cpp
is the build that is installed, float32 cache, flash attention off; loading, prefill and compilation are left out of
both. Then a step of many sequences stands beside a prefill of as many tokens, which reads the weights as often.
With --pair, `generate` on the file and its `.apr` is timed from outside, everything included but compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import aprjax
from aprjax.checkpoint.fetch import model_location
from aprjax.qwen2 import preset
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.generate import generate
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer, wrap

# Long to answer, and no near-tie at the first token, as `def fib(n):` is.
PROMPT = wrap("Explain what a hash table is.", "once")
WIDTHS = (1, 4, 16)
# Decodes as often as a line comes in: the two engines take turns and never run at once.
PEER = """
import json, sys, time
import llama_cpp, numpy as np
path, tokens, count, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
llama = llama_cpp.Llama(
    path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=False, type_k=0, type_v=0, verbose=False
)
for _ in sys.stdin:
    llama.reset()
    llama.eval(tokens)
    found, start = [], time.perf_counter()
    while len(found) < count:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
        found.append(int(logits.argmax()))
        if len(found) == 1:
            start = time.perf_counter()
        if len(found) < count:
            llama.eval(found[-1:])
    print(json.dumps([time.perf_counter() - start, found]), flush=True)
"""


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Prints one line per engine, then one per width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--arithmetic", default="llama.cpp,float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pair", action="store_true")
    options = parser.parse_args()
    enable_compilation_cache()
    path, cores = model_location(options.model), os.cpu_count() or 1
    checkpoint = aprjax.open(path)
    prompt = Tokenizer.from_checkpoint(checkpoint).encode(PROMPT)
    models = {name: Qwen2(checkpoint, preset(name)) for name in options.arithmetic.split(",")}
    command = [sys.executable, "-c", PEER, str(path), json.dumps(prompt), str(options.tokens), str(cores)]
    environment = {**os.environ, "GGML_CPU_TILED_MM": "0"}
    print(f"{options.model}, {cores} cores, load average {os.getloadavg()[0]:.1f}; {options.tokens} tokens, greedy")
    found: dict[str, list[int]] = {}
    times: dict[str, list[float]] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        # The first round compiles and is not counted.
        for counted in (False, *[True] * options.repeats):
            for name, model in models.items():
                took, tokens = ours(model, prompt, options.tokens)
                times.setdefault(name, []).extend([took] * counted)
                found[name] = tokens
            peer.stdin.write("go\n")
            peer.stdin.flush()
            took, tokens = json.loads(peer.stdout.readline())
            times.setdefault("llama.cpp itself", []).extend([took] * counted)
            found["llama.cpp itself"] = tokens
        peer.stdin.close()
    # Other work only ever makes a run slower, so the least of the repetitions counts.
    engine = min(times["llama.cpp itself"])
    for name, taken in times.items():
        least = min(taken)
        same = common(found[name], found["llama.cpp itself"])
        print(
            f"  {name:20} {(options.tokens - 1) / least:7.1f} tokens/s"
            f"  ({min(taken):.2f} to {max(taken):.2f} s; {least / engine:5.1f} times llama.cpp's;"
            f" first {same} tokens the same)"
        )
    for name, model in models.items():
        for width in WIDTHS:
            print(f"  {name:20} {width:3} at once: {together(model, prompt, width)}", flush=True)
    if options.pair:
        models.clear()
        taken = pair(path, options.tokens)
        print(f"  generate on an agreeing pair, {options.tokens} tokens: {taken:.1f} s;", end=" ")
        print(f"{taken / engine * (options.tokens - 1) / options.tokens:.1f} times llama.cpp's decode")


def pair(path: Path, count: int) -> float:
    """Seconds of `bisect generate` on a file and its conversion, the second time: programs are compiled then."""
    with tempfile.TemporaryDirectory() as folder:
        apr = Path(folder) / "model.apr"
        aprjax_ = [sys.executable, "-m", "aprjax"]
        subprocess.run([*aprjax_, "convert", "--keep-blocks", str(path), str(apr)], check=True, capture_output=True)
        command = [*aprjax_, "generate", "--model", str(apr), "--ref", str(path), "--prompt", PROMPT, "--ignore-stop"]
        command += ["--max-new-tokens", str(count)]
        return min(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(2))


def ours(model: Qwen2, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds from the first token to the last, and the tokens."""
    generation = generate(model, prompt, max_new_tokens=count)
    steps = iter(generation)
    next(steps)
    took = seconds(lambda: list(steps))
    return took, generation.tokens


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two continuations begin with alike."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(first))


def together(model: Qwen2, prompt: list[int], width: int) -> str:
    """A step of many sequences, and a prefill of as many tokens."""
    prompts, steps = [prompt] * width, 8
    clock: list[float] = []
    for _ in range(2):
        clock.clear()
        generate_batch(
            model, prompts, max_new_tokens=steps, on_step=lambda done, total: clock.append(time.perf_counter())
        )
    # The last sequence's call of each step comes when the step is done.
    ends = clock[width - 1 :: width]
    step = statistics.median(b - a for a, b in pairwise(ends))
    tokens = (prompt * width)[:width]
    model(tokens)
    prefill = min(seconds(lambda: model(tokens).block_until_ready()) for _ in range(2))
    return f"{width / step:7.1f} tokens/s; a step {step:.3f} s, a prefill of {width} tokens {prefill:.3f} s"


if __name__ == "__main__":
    main()
