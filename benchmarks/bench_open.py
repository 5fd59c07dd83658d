"""Opening a GGUF file: aprjax against gguf-py, both made to yield every token and merge as text.

    python benchmarks/bench_open.py [FILE] [--json]

Each reader runs in a process of its own, so that neither profits from the other's imports or freed
memory; imports are not timed. Runs alternate, the page cache is warm after the first (untimed) round,
and the median counts. Exit code 1 if aprjax is not at least 15 times as fast (the project's bar).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 3
BAR = 15.0

OURS = """
import resource, sys, time
import aprjax, aprjax.checkpoint.gguf_reader
start = time.perf_counter()
checkpoint = aprjax.open(sys.argv[1])
tokens, merges = checkpoint.vocabulary.tokens, checkpoint.vocabulary.merges
characters = sum(map(len, tokens)) + sum(map(len, merges))
"""
THEIRS = """
import resource, sys, time
import gguf
start = time.perf_counter()
reader = gguf.GGUFReader(sys.argv[1])
tokens = reader.get_field("tokenizer.ggml.tokens").contents()
merges = reader.get_field("tokenizer.ggml.merges").contents()
characters = sum(map(len, tokens)) + sum(map(len, merges))
"""
REPORT = """
seconds = time.perf_counter() - start
print(seconds, len(tokens), len(merges), characters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure(program: str, path: Path) -> tuple[float, tuple[int, int, int], float]:
    """Seconds, what was read (tokens, merges, characters), and the process's peak memory in MiB."""
    command = [sys.executable, "-c", program + REPORT, str(path)]
    fields = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    counts = (int(fields[1]), int(fields[2]), int(fields[3]))
    return float(fields[0]), counts, int(fields[4]) / 1024


def main() -> int:
    from aprjax.checkpoint.fetch import model_location

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=model_location("qwen2.5-coder-1.5b"))
    parser.add_argument("--json", action="store_true", help="print JSON only")
    arguments = parser.parse_args()
    runs = {"aprjax": OURS, "gguf-py": THEIRS}
    results: dict[str, list[tuple[float, tuple[int, int, int], float]]] = {name: [] for name in runs}
    for round_number in range(ROUNDS + 1):
        for name, program in runs.items():
            result = measure(program, arguments.file)
            if round_number:
                results[name].append(result)
    read = {counts for runs_of_one in results.values() for _, counts, _ in runs_of_one}
    if len(read) != 1:
        raise SystemExit(f"the readers disagree on what is in the file: {sorted(read)}")
    seconds = {name: statistics.median(run[0] for run in runs_of_one) for name, runs_of_one in results.items()}
    memory = {name: max(run[2] for run in runs_of_one) for name, runs_of_one in results.items()}
    ratio = seconds["gguf-py"] / seconds["aprjax"]
    summary = {"file": arguments.file.name, "rounds": ROUNDS, "seconds": seconds, "peak_mib": memory, "ratio": ratio}
    if arguments.json:
        print(json.dumps(summary))
    else:
        tokens, merges, _ = read.pop()
        print(f"{arguments.file.name}: {tokens} tokens, {merges} merges, median of {ROUNDS}, page cache warm")
        for name in runs:
            print(f"  {name:8} {seconds[name]:8.3f} s   {memory[name]:6.0f} MiB peak")
        print(f"  {ratio:.0f} times as fast")
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
