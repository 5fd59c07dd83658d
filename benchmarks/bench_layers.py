"""`layers` end to end on a real pair, cold and warm, with its peak memory; and llama.cpp on the same tokens.

    python benchmarks/bench_layers.py [--model qwen2.5-coder-1.5b] [--repeats 3]

Cold: no compiled programs in the cache. Warm: a second run. Each run is a process of its own, timed and
measured from outside. The peer is one llama.cpp prefill of the same tokens (plain build, no capture, loading excluded)
in a process of its own: `layers` runs two sides, captures and compares every stage, and reads both files.
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
from pathlib import Path

from aprjax.checkpoint.fetch import model_location
from aprjax.text.probes import PROBES

PEER = """
import json, sys, time
import llama_cpp
tokens = json.loads(sys.argv[2])
options = dict(n_ctx=1024, n_batch=1024, n_threads=int(sys.argv[3]), logits_all=True, verbose=False)
llama = llama_cpp.Llama(sys.argv[1], **options)
times = []
for _ in range(int(sys.argv[4])):
    llama.reset()
    start = time.perf_counter()
    llama.eval(tokens)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def run(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Wall seconds and peak bytes of one command, which must exit with 0."""
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Prints one line per prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    gguf = model_location(options.model)
    with tempfile.TemporaryDirectory() as folder:
        apr, out = Path(folder) / "a.apr", Path(folder) / "out.json"
        convert = [sys.executable, "-m", "aprjax", "convert", str(gguf), str(apr)]
        seconds, _ = run(convert, dict(os.environ))
        bytes_of_both = gguf.stat().st_size + apr.stat().st_size
        print(
            f"{options.model}, {os.cpu_count()} cores; both files {bytes_of_both / 1e9:.2f} GB; convert {seconds:.1f} s"
        )
        print("prompt   tokens   cold s   warm s   peak GB   of both files   llama.cpp prefill s   warm / prefill")
        for probe in PROBES:
            prompt = Path(folder) / "prompt"
            prompt.write_text(probe.prompt(), encoding="utf-8")
            command = [sys.executable, "-m", "aprjax", "layers", "--model", str(apr), "--ref", str(gguf)]
            command += ["--prompt-file", str(prompt), "--json", str(out)]
            # A cache of its own for compiled programs, empty at first; the models stay where they are.
            environment = {**os.environ, "APRJAX_CACHE": str(Path(folder) / probe.name)}
            cold, _ = run(command, environment)
            warm = [run(command, environment) for _ in range(options.repeats)]
            tokens = json.loads(out.read_text())["prompt"]["tokens"]
            peer = [
                sys.executable,
                "-c",
                PEER,
                str(gguf),
                json.dumps(tokens),
                str(os.cpu_count()),
                str(options.repeats),
            ]
            plain = {**os.environ, "GGML_CPU_TILED_MM": "0"}
            prefill = min(json.loads(subprocess.run(peer, env=plain, check=True, capture_output=True).stdout))
            seconds, peak = statistics.median(w[0] for w in warm), max(w[1] for w in warm)
            print(
                f"{probe.name:8} {len(tokens):6} {cold:8.1f} {seconds:8.1f} {peak / 1e9:9.2f} "
                f"{peak / bytes_of_both:15.2f} {prefill:21.2f} {seconds / prefill:16.1f}"
            )


if __name__ == "__main__":
    main()
