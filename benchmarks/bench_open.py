"""Opening a GGUF file with its vocabulary: aprjax, gguf-py and transformers, in one run.

    python benchmarks/bench_open.py [FILE] [--repeats 3] [--without-transformers]

aprjax and gguf-py are made to yield every token and merge as text. Each reader runs in a process of its own, so that
none profits from another's imports or freed memory; imports are not timed. Runs alternate, the page cache is warm
after the first (uncounted) round, and the median counts. transformers decodes the whole file and builds its tokenizer,
for more than a minute: it opens once. Exits with 1 below the project's bars.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from measured import Results, Table, measure, parser

# Issue "Fast, and at full size", acceptance 1: times as fast.
BARS = {"gguf-py": 30.0, "transformers": 100.0}
READERS = {
    "aprjax": """
import aprjax, aprjax.checkpoint.gguf_reader
start = now()
checkpoint = aprjax.open(sys.argv[1])
tokens, merges = checkpoint.vocabulary.tokens, checkpoint.vocabulary.merges
read = [len(tokens), len(merges), sum(map(len, tokens)) + sum(map(len, merges))]
""",
    "gguf-py": """
import gguf
start = now()
reader = gguf.GGUFReader(sys.argv[1])
tokens = reader.get_field("tokenizer.ggml.tokens").contents()
merges = reader.get_field("tokenizer.ggml.merges").contents()
read = [len(tokens), len(merges), sum(map(len, tokens)) + sum(map(len, merges))]
""",
    "transformers": """
import pathlib, transformers, torch
path = pathlib.Path(sys.argv[1])
start = now()
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
read = [len(tokenizer)]
""",
}
PROGRAM = """
import json, sys, time
def now():
    return time.perf_counter(), time.process_time()
{reader}
end = now()
print()
print(json.dumps([end[0] - start[0], end[1] - start[1], read]))
"""


def main() -> int:
    from aprjax.checkpoint.fetch import model_location

    options = parser(__doc__)
    options.add_argument("file", nargs="?", type=Path, default=model_location("qwen2.5-coder-1.5b"))
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--without-transformers", action="store_true")
    arguments = options.parse_args()
    found: dict[str, list[tuple[float, float, list[int], float]]] = {name: [] for name in READERS}
    for round_number in range(1 + arguments.repeats):
        for name, reader in READERS.items():
            if name == "transformers" and (arguments.without_transformers or round_number != 1):
                continue
            process = measure([sys.executable, "-c", PROGRAM.format(reader=reader), str(arguments.file)])
            wall, processor, read = json.loads(process.said.splitlines()[-1])
            if round_number:
                found[name].append((wall, processor, read, process.peak_gb))
    if found["aprjax"][0][2] != found["gguf-py"][0][2]:
        raise SystemExit(f"the readers disagree: {found['aprjax'][0][2]} and {found['gguf-py'][0][2]}")
    walls = {name: statistics.median(run[0] for run in runs) for name, runs in found.items() if runs}
    processors = {name: statistics.median(run[1] for run in found[name]) for name in walls}
    rows = [
        (name, walls[name], processors[name], max(run[3] for run in found[name]) * 1e3, walls[name] / walls["aprjax"])
        for name in walls
    ]
    tokens, merges, _ = found["aprjax"][0][2]
    about = (
        f"{arguments.file.name}: {tokens} tokens, {merges} merges, page cache warm, the median of {arguments.repeats}"
    )
    results = Results("open", about + " (transformers: once).", arguments.out)
    note = "The bars: " + ", ".join(f"{bar:.0f} times as fast as {name}" for name, bar in BARS.items()) + "."
    results.add(Table("Opening", ("", "wall s", "processor s", "peak MB", "times aprjax's"), rows, note))
    for name, bar in BARS.items():
        if name in walls:
            results.bar(f"times as fast as {name}", walls[name] / walls["aprjax"], at_least=bar)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
