"""Tracing every stage of a model: aprjax, cold and warm, and llama.cpp with an evaluation callback, in one run.

    python benchmarks/bench_trace.py [--model qwen2.5-coder-1.5b] [--tokens 256] [--repeats 2] [--library DIR]

`held`: the trace stays in memory; `saved`: it is written to a file, as `python -m aprjax trace --save` writes it.
Each run is a process of its own, from its start to its end, that opens the model, runs the tokens and captures every
stage. Cold: no compiled programs in the cache. llama.cpp is the plain build with as many threads as there are cores,
once capturing the same stages to a file and once only computing, which is less than any capture of its can take.
`--library` adds another build of it, with its tiles and repacked weights. Runs take turns and the least counts. Wall
seconds mean something on an idle machine; processor seconds also beside other work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aprjax.checkpoint.fetch import model_location

OURS = """
import json, sys
from pathlib import Path
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.trace.memory import save
from aprjax.trace.sides import open_side
enable_compilation_cache()
trace = open_side(sys.argv[1]).trace(json.loads(sys.argv[2]))
assert len(trace) == 3 + 17 * (1 + max(layer for layer, _ in trace))
if sys.argv[3] != "-":
    save(trace, Path(sys.argv[3]))
"""
THEIRS = """
import json, sys
from pathlib import Path
from aprjax.trace.llama_cpp import LlamaOptions, save_llama_cpp
options = LlamaOptions(**json.loads(sys.argv[4]))
save_llama_cpp(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), options)
"""
WITHOUT_CAPTURE = """
import json, os, sys
import llama_cpp
tokens = json.loads(sys.argv[2])
threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
options = dict(n_ctx=len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), logits_all=True, verbose=False)
llama_cpp.Llama(sys.argv[1], n_threads=threads, n_threads_batch=threads, **options).eval(tokens)
"""


def measure(program: str, arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak GB of one process and its children."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a run exited with {process.returncode}: {said.decode(errors='replace')[-500:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    """Prints one line for each kind of run, and exits with 1 where llama.cpp captures faster than a warm aprjax."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--library", help="folder of another build of llama.cpp")
    options = parser.parse_args()
    gguf = str(model_location(options.model))
    tokens = json.dumps([100 + 7 * index for index in range(options.tokens)])
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "trace.safetensors")
        plain = {**os.environ, "GGML_CPU_TILED_MM": "0"}

        def ours(cache: str) -> dict[str, str]:
            return {**os.environ, "APRJAX_CACHE": str(Path(folder) / cache)}

        runs = {
            "aprjax warm, held": (OURS, [gguf, tokens, "-"], ours("warm")),
            "aprjax warm, saved": (OURS, [gguf, tokens, target], ours("warm")),
            "llama.cpp, saved": (THEIRS, [gguf, tokens, target, "{}"], plain),
            "llama.cpp, no capture": (WITHOUT_CAPTURE, [gguf, tokens], plain),
        }
        if options.library:
            another = json.dumps({"library": options.library, "tiled": True, "repack": True})
            runs[f"llama.cpp of {Path(options.library).name}, saved"] = (THEIRS, [gguf, tokens, target, another], plain)
        found = {"aprjax cold, saved": [measure(OURS, [gguf, tokens, target], ours("warm"))]}
        for _ in range(options.repeats):
            for name, run in runs.items():
                found.setdefault(name, []).append(measure(*run))
    least = {name: tuple(map(min, zip(*measured, strict=True))) for name, measured in found.items()}
    print(f"{options.model}, {options.tokens} tokens, {os.cpu_count()} cores, least of {options.repeats}")
    print(f"{'':36} wall s   processor s   peak GB")
    for name, (wall, processor, peak) in least.items():
        print(f"{name:36} {wall:6.1f} {processor:13.1f} {peak:9.2f}")
    ratio = least["llama.cpp, saved"][0] / least["aprjax warm, saved"][0]
    print(f"warm aprjax is {ratio:.2f} times as fast as llama.cpp, both saving")
    raise SystemExit(0 if ratio >= 1 else 1)


if __name__ == "__main__":
    main()
