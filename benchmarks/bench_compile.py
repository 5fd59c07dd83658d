"""What is compiled, when, and for how long: a model's forward passes of growing length, and its decoding.

    python benchmarks/bench_compile.py [--model qwen2.5-coder-0.5b] [--lengths 5,7,8,12,16,100,128,130,190,250,256]

A process of its own without the cache of compiled programs. Lengths share programs by the bucket that they are padded
to (`aprjax.qwen2.model.bucket`): only the first of a bucket compiles. Then the same in a second process, whose cache
the first has filled: programs are looked up, and not compiled.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from measured import Results, Table, measure, parser

# What cuts rows to their number is compiled for each number, in milliseconds; a layer or the head takes far longer.
MOST_SECONDS = 0.5
PROGRAM = """
import json, sys, time
import jax, aprjax
from aprjax.qwen2 import preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.generate import generate
from aprjax.qwen2.model import Qwen2, bucket
enable_compilation_cache()
events = {"compiled": [], "looked up": []}
def heard(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        events["compiled"].append(seconds)
    if event == "/jax/compilation_cache/cache_retrieval_time_sec":
        events["looked up"].append(seconds)
jax.monitoring.register_event_duration_secs_listener(heard)
start = time.perf_counter()
model = Qwen2(aprjax.open(sys.argv[1]), preset("llama.cpp"))
def report(what, run):
    for times in events.values():
        times.clear()
    start = time.perf_counter()
    jax.block_until_ready(run())
    found = [len(events["compiled"]) - len(events["looked up"]), len(events["looked up"])]
    print(json.dumps([what, *found, sum(events["compiled"]), time.perf_counter() - start]), flush=True)
report("loading", lambda: Qwen2(aprjax.open(sys.argv[1]), preset("llama.cpp")))
for length in map(int, sys.argv[2].split(",")):
    report(f"{length} tokens (as {bucket(length)})", lambda: model(list(range(100, 100 + length))))
for count in (3, 20):
    report(f"{count} tokens decoded after 5", lambda: list(generate(model, [1, 2, 3, 4, 5], max_new_tokens=count)))
"""


def main() -> int:
    from aprjax.checkpoint.fetch import model_location

    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-0.5b")
    options.add_argument("--lengths", default="5,7,8,12,16,100,128,130,190,250,256")
    arguments = options.parse_args()
    path = Path(arguments.model)
    path = path if path.is_file() else model_location(arguments.model)
    command = [sys.executable, "-c", PROGRAM, str(path), arguments.lengths]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            said = measure(command, {"APRJAX_CACHE": str(Path(folder) / "cache")}).said
            found.append([json.loads(line) for line in said.splitlines() if line.startswith("[")])
    rows = [
        (what, compiled, seconds, wall, again[1], again[2], again[4])
        for (what, compiled, _, seconds, wall), again in zip(*found, strict=True)
    ]
    columns = ("first process, in this order", "compiled", "compiling s", "whole wall s")
    columns += ("second: compiled", "looked up", "whole wall s")
    about = f"{path.name}, the arithmetic `llama.cpp`. Programs that compile in less than 0.1 s are not kept."
    results = Results("compile", about, arguments.out)
    results.add(Table("Compiled programs", columns, rows))
    seen: set[str] = set()
    for what, _, compiling, *_ in rows:
        bucket = what.split("as ")[-1]
        if "(as" in what and bucket in seen:
            results.bar(f"compiling for {what}, another length of its bucket, s", compiling, at_most=MOST_SECONDS)
        seen.add(bucket)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
