"""Tracing every stage of a model, whole processes: aprjax, cold and warm, and llama.cpp by its callback, in one run.

    python benchmarks/bench_trace.py [--model qwen2.5-coder-1.5b] [--tokens 256] [--repeats 2]

What a user waits for: each run is a process of its own, from its start to its end. It imports Python's libraries, opens
and loads the model, hashes the file, looks up (cold: compiles) programs, runs the tokens and captures every stage.
`held`: the trace stays in memory; `saved`: it is written to a file that is not there before, as `python -m aprjax trace
--save` writes it. llama.cpp is the plain build with as many threads as there are cores, once capturing the same stages
to a file, driven and written by aprjax from a child process, and once only computing, which is less than any capture of
its can take; where `make peers` has made its default build (tiles, repacked weights), that, too.

Runs take turns and the least counts. The project's bar is about engines that are loaded: `bench_prefill.py` has it.
Wall seconds mean something on an idle machine; processor seconds also beside other work.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from measured import PLAIN_LLAMA, Results, Table, cores, least_of, measure, parser

from aprjax.checkpoint.fetch import model_location
from aprjax.trace.llama_builds import installed_builds

OURS = """
import json, sys
from pathlib import Path
from aprjax.checkpoint import open_checkpoint
from aprjax.qwen2 import preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.trace.streamed import StreamedRun
enable_compilation_cache()
run = StreamedRun(open_checkpoint(sys.argv[1]), json.loads(sys.argv[2]), preset("llama.cpp"))
trace = run.collect() if sys.argv[3] == "-" else run.save(Path(sys.argv[3]))
assert len(trace) == 3 + 17 * (1 + max(layer for layer, _ in trace))
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


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-1.5b")
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--repeats", type=int, default=2)
    arguments = options.parse_args()
    gguf = str(model_location(arguments.model))
    tokens = json.dumps([100 + 7 * index for index in range(arguments.tokens)])
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "trace.safetensors")
        cache = {"APRJAX_CACHE": str(Path(folder) / "cache")}
        runs = {
            "aprjax warm, held": (OURS, [gguf, tokens, "-"], cache),
            "aprjax warm, saved": (OURS, [gguf, tokens, target], cache),
            "llama.cpp, saved": (THEIRS, [gguf, tokens, target, "{}"], PLAIN_LLAMA),
            "llama.cpp, no capture": (WITHOUT_CAPTURE, [gguf, tokens], PLAIN_LLAMA),
        }
        default = installed_builds().get("default")
        if default is not None:
            another = json.dumps({"library": str(default), "tiled": True, "repack": True})
            runs["llama.cpp's default build, saved"] = (THEIRS, [gguf, tokens, target, another], {})

        def run(program: str, given: list[str], environment: dict[str, str]):
            Path(target).unlink(missing_ok=True)
            return measure([sys.executable, "-c", program, *given], environment)

        found = {"aprjax cold, saved": [run(*runs["aprjax warm, saved"])]}
        for _ in range(arguments.repeats):
            for name, one in runs.items():
                found.setdefault(name, []).append(run(*one))
    least = {name: least_of(measured) for name, measured in found.items()}
    about = f"{arguments.model}, {arguments.tokens} tokens, {cores()} cores, the least of {arguments.repeats}."
    results = Results("trace", about + " Whole processes.", arguments.out)
    engine = least["llama.cpp, saved"]
    rows = [
        (name, one.wall, one.processor, one.peak_gb, engine.wall / one.wall, engine.processor / one.processor)
        for name, one in least.items()
    ]
    columns = ("", "wall s", "processor s", "peak GB", "speed of llama.cpp saving (wall)", "(processor)")
    results.add(Table("Tracing every stage", columns, rows))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
