"""`layers` end to end on a real pair, cold and warm, with its peak memory; and llama.cpp on the same tokens.

    python benchmarks/bench_layers.py [--model qwen2.5-coder-1.5b] [--repeats 3] [--probes direct,chatml,long]

Cold: no compiled programs in the cache. Warm: a second run. Each run is a process of its own, timed and
measured from outside. The peer is one llama.cpp prefill of the same tokens (plain build, no capture, loading excluded)
in a process of its own: `layers` runs two sides, captures and compares every stage, and reads both files.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from llama import Llama
from measured import Results, Table, cores, measure, parser, shown

from aprjax.checkpoint.fetch import model_location
from aprjax.text.probes import PROBES

# Issue "Fast, and at full size", acceptance 4, for the ChatML prompt: wall seconds, and GB beyond both files.
MOST_WARM, MOST_COLD, MOST_BEYOND_FILES = 15.0, 45.0, 1.5 * 1.073741824
CONTEXT = 1024


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-1.5b")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--probes", default="direct,chatml,long")
    arguments = options.parse_args()
    gguf, rows, chatml = model_location(arguments.model), [], None
    with tempfile.TemporaryDirectory() as folder, Llama(gguf, CONTEXT) as peer:
        apr, out = Path(folder) / "a.apr", Path(folder) / "out.json"
        converting = measure([sys.executable, "-m", "aprjax", "convert", str(gguf), str(apr)])
        both = (gguf.stat().st_size + apr.stat().st_size) / 1e9
        for probe in PROBES:
            if probe.name not in arguments.probes.split(","):
                continue
            prompt = Path(folder) / "prompt"
            prompt.write_text(probe.prompt(), encoding="utf-8")
            command = [sys.executable, "-m", "aprjax", "layers", "--model", str(apr), "--ref", str(gguf)]
            command += ["--prompt-file", str(prompt), "--json", str(out)]
            # A cache of its own for compiled programs, empty at first; the models stay where they are.
            environment = {"APRJAX_CACHE": str(Path(folder) / probe.name)}
            cold = measure(command, environment)
            warm = [measure(command, environment) for _ in range(arguments.repeats)]
            tokens = json.loads(out.read_text())["prompt"]["tokens"]
            prefill = min(peer.run(tokens).prefill[0] for _ in range(arguments.repeats))
            seconds, peak = statistics.median(one.wall for one in warm), max(one.peak_gb for one in warm)
            processor = min(one.processor for one in warm)
            rows.append((probe.name, len(tokens), cold.wall, seconds, processor, peak, peak - both, prefill))
            if probe.name == "chatml":
                chatml = (seconds, cold.wall, max(peak, cold.peak_gb) - both)
    about = f"{arguments.model}, {cores()} cores; both files {both:.2f} GB; `convert` {converting.wall:.1f} s."
    results = Results("layers", about, arguments.out)
    columns = ("prompt", "tokens", "cold s", "warm s", "warm processor s", "peak GB", "beyond the files GB")
    note = (
        f"The bars are the ChatML prompt's: cold at most {shown(MOST_COLD)} s, warm at most {shown(MOST_WARM)} s, and "
        f"{shown(MOST_BEYOND_FILES)} GB (1.5 GiB) beyond both files. Below zero the peak is less than the files' size."
    )
    results.add(Table("`layers` on a file and its conversion", (*columns, "llama.cpp prefill s"), rows, note))
    if chatml is not None:
        for what, value, bar in zip(
            ("warm, wall s", "cold, wall s", "peak beyond both files, GB"),
            chatml,
            (MOST_WARM, MOST_COLD, MOST_BEYOND_FILES),
            strict=True,
        ):
            results.bar(what, value, at_most=bar)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
