"""`layers`, `locate` and `attribute` on full-size pairs with one planted fault: time, memory, and how both grow.

    python benchmarks/full_size.py [--sizes 1.5b 3b 7b] [--commands layers …] [--tokens 64] [--keep DIR] [--state FILE]

The pairs are random weights in the shapes and block types of the real models (`synthetic.py`), the reference as GGUF,
the model as APR with one fault (`faults/plant.py`). Each command is a process of its own on all stages, reports its
peak of resident memory (pages of mapped files included), and must name the fault's layer and stage. Every size is run
in its full depth and with `SHALLOW` layers of the same widths, after shallow runs that are not counted and leave all
programs compiled: what the full depth takes beyond the shallow one has no start-up in it. A 7B pair takes 14 GB of disk
while it is made and 9.4 GB afterwards; what was made is removed, unless `--keep` says where it stays. With `--state`,
runs that are written there are not made again. Exits with 1 above the project's bars.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from full_size_law import Run, drawn, law_tables
from measured import Results, Table, cores, parser
from synthetic import SHAPES, config_of, random_tensors, write_synthetic

from aprjax.checkpoint.types import ModelConfig

PLANT = Path(__file__).resolve().parent / "faults" / "plant.py"

# The last layers too are run, and so most of them are behind the fault: what `locate` searches and `attribute` crosses.
FAULT, DEPTH = "k-bias-zero", 0.3
# Holds both mixes of block types that the layers have (`synthetic.block_type`), so that all programs are compiled.
SHALLOW = 4
# By name: the arguments, the exit codes that an answer has, and the most GiB (issue "Fast, and at full size").
COMMANDS = {
    "layers": (["layers"], (1,), 12.0),
    "layers in float32": (["layers", "--arithmetic", "float32"], (1,), 8.0),
    "locate": (["locate"], (1,), 24.0),
    "attribute": (["attribute", "--steps", "2", "--verify", "1"], (0,), 24.0),
}
# Runs a command as `python -m aprjax` does, and says what only the process itself knows exactly: its largest resident
# size. `ru_maxrss`, seen from outside, begins with the size of the process that started it.
PROGRAM = """
import json, os, sys
from aprjax.cli import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
used = os.times()
processor = used.user + used.system + used.children_user + used.children_system
print(json.dumps({"code": code, "processor": processor, "peak_gib": peak / 2**20}), file=sys.stderr)
"""


def make_pair(folder: Path, config: ModelConfig, size: str, vocabulary: Path | None) -> tuple[Path, Path, dict]:
    """(reference, model with the fault, where it was planted); files that are there already are taken."""
    stem = f"{size}-{config.num_layers}"
    ref, clean, faulty = (folder / f"{stem}{suffix}" for suffix in (".gguf", ".apr", "-faulty.apr"))
    planted = folder / f"{stem}-planted.json"
    if planted.exists():
        return ref, faulty, json.loads(planted.read_text())
    for path in (ref, clean):
        write_synthetic(path, config, vocabulary=vocabulary)
    layer = round(config.num_layers * DEPTH)
    planter = [sys.executable, str(PLANT), str(clean), str(faulty)]
    outcome = subprocess.run(
        [*planter, "--fault", FAULT, "--layer", str(layer)], check=True, capture_output=True, text=True
    )
    clean.unlink()
    expected = json.loads(outcome.stdout)["expected"]
    planted.write_text(json.dumps(expected))
    return ref, faulty, expected


def run_once(command: str, ref: Path, model: Path, tokens: list[int], report: Path) -> tuple[dict[str, Any], dict]:
    """Runs one command as a process: its numbers (`wall` among them) and its report."""
    words, codes, _ = COMMANDS[command]
    ids = ",".join(map(str, tokens))
    sides = ["--model", str(model), "--ref", str(ref), "--tokens", ids, "--json", str(report)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words, *sides], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    last = (done.stderr.splitlines() or [""])[-1]
    numbers = json.loads(last) if last.startswith("{") else {"code": done.returncode}
    if numbers["code"] not in codes:
        raise SystemExit(f"{' '.join(words)} exited with {numbers['code']}: {(done.stdout + done.stderr)[-600:]}")
    return {**numbers, "wall": wall}, json.loads(report.read_text())


def where(report: dict) -> str:
    """The layer and stage that a report accuses; of `attribute`, that of the largest share which a file makes.

    What rounding makes of a fault behind it is a share of its own there, and can be the larger one.
    """
    if "faults" in report:  # locate
        found = report["faults"]
    elif "contributions" in report:
        found = [share for share in report["contributions"] if share["source"] == "file"]
    else:
        found = [report["first_divergence"] or {}]
    first = (found or [{}])[0]
    return f"layer {first.get('layer')} {first.get('stage')}"


def said(report: dict) -> str:
    """The report's reason, and the sums by cause of `attribute`."""
    causes = [f"{cause['name']} {cause['integrated']:+.3g}" for cause in report.get("causes", ())[:2]]
    return "; ".join([report["reason"], *causes])


@dataclass
class Bench:
    """What all runs share, and where they are written down as they are made."""

    tokens: int
    vocabulary: Path | None
    state: Path | None
    runs: dict[tuple[str, int, str, int], Run]

    @classmethod
    def open(cls, tokens: int, vocabulary: Path | None, state: Path | None) -> Bench:
        """With the runs that the state holds."""
        lines = state.read_text(encoding="utf-8").splitlines() if state is not None and state.exists() else []
        known = [Run(**json.loads(line)) for line in lines]
        return cls(tokens, vocabulary, state, {run.key: run for run in known})

    def measure(self, folder: Path, size: str, layers: int, commands: list[str]) -> Iterator[Run]:
        """The commands on a model of so many layers, one after the other."""
        config = config_of(size, layers=layers)
        for command in commands:
            if (size, layers, command, self.tokens) not in self.runs:
                self.keep(self._run(folder, size, config, command))
            yield self.runs[size, layers, command, self.tokens]

    def warm_up(self, folder: Path, size: str, commands: list[str]) -> None:
        """The shallow model by every command that is still to be measured, so that all programs are compiled."""
        depths = SHALLOW, config_of(size).num_layers
        wanted = [c for c in commands if any((size, n, c, self.tokens) not in self.runs for n in depths)]
        for command in wanted:
            self._run(folder, size, config_of(size, layers=SHALLOW), command)

    def keep(self, run: Run) -> None:
        """Writes a run down."""
        self.runs[run.key] = run
        if self.state is not None:
            with self.state.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(run)) + "\n")

    def _run(self, folder: Path, size: str, config: ModelConfig, command: str) -> Run:
        ref, model, expected = make_pair(folder, config, size, self.vocabulary)
        fed = np.random.default_rng(0).integers(0, 256, self.tokens).tolist()
        numbers, report = run_once(command, ref, model, fed, folder / f"{command.replace(' ', '-')}.json")
        found = where(report)
        return Run(
            size=size,
            layers=config.num_layers,
            command=command,
            parameters=sum(math.prod(tensor.shape) for tensor in random_tensors(config, 0)),
            tokens=self.tokens,
            wall=numbers["wall"],
            processor=numbers["processor"],
            peak_gib=numbers["peak_gib"],
            found=found,
            right=found == f"layer {expected['layer']} {expected['stage']}",
            said=said(report),
        )


def measured(bench: Bench, arguments: argparse.Namespace) -> Iterator[Run]:
    """All sizes, commands and depths that are asked for, said as they come."""
    for size in arguments.sizes:
        with contextlib.ExitStack() as stack:
            folder = arguments.keep
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder, prefix="aprjax-")))
            if not arguments.deep_only:
                bench.warm_up(folder, size, arguments.commands)
            for layers in (SHALLOW, config_of(size).num_layers)[arguments.deep_only :]:
                for run in bench.measure(folder, size, layers, arguments.commands):
                    print(f"{run.size} {run.layers} layers, {run.command}: {run.wall:.1f} s, {run.found}", flush=True)
                    yield run


def main() -> int:
    """Measures what is asked for, and writes tables, the scaling law and a plot."""
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.5b", "3b", "7b"])
    options.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options.add_argument("--tokens", type=int, default=64, metavar="N")
    options.add_argument("--vocabulary", type=Path, metavar="FILE", help="a checkpoint whose vocabulary is copied")
    options.add_argument("--folder", type=Path, help="where the files are made; by default the system's for such")
    options.add_argument(
        "--keep", type=Path, metavar="DIR", help="make the files here, leave them, take those there are"
    )
    options.add_argument("--deep-only", action="store_true", help="no shallow models: compiled programs may be lacking")
    options.add_argument("--state", type=Path, metavar="FILE", help="runs are written here, and not made again")
    options.add_argument("--report", action="store_true", help="run nothing: tables of all that the state holds")
    options.add_argument("--note", default="", metavar="TEXT", help="what the page says of the circumstances")
    arguments = options.parse_args()
    bench = Bench.open(arguments.tokens, arguments.vocabulary, arguments.state)
    about = (
        f"Random weights in the shapes of Qwen2.5, Q4_K and Q6_K; the model with {FAULT} at {DEPTH:.0%} of its depth; "
        f"{arguments.tokens} tokens, {cores()} cores; programs compiled before. "
        f"{arguments.note}".rstrip()
    )
    results = Results("full-size", about, arguments.out)
    if arguments.report:
        runs = [run for run in bench.runs.values() if run.tokens == arguments.tokens]
        runs.sort(key=lambda run: (list(COMMANDS).index(run.command), run.parameters))
    else:
        runs = list(measured(bench, arguments))
    full = [run for run in runs if run.layers == config_of(run.size).num_layers]
    rows = [
        (run.command, run.size, run.parameters / 1e9, run.wall, run.processor, run.peak_gib, run.found) for run in full
    ]
    columns = ("command", "size", "parameters, 10^9", "wall s", "processor s", "peak GiB", "found at")
    results.add(Table("Full depth", columns, rows, "Peak of one process; parameters of one side."))
    rows = [(f"{run.command}, {run.size}", run.said) for run in full]
    results.add(Table("What the commands said", ("command", "reason"), rows))
    for run in full:
        results.bar(f"{run.command} on {run.size}, peak GiB", run.peak_gib, at_most=COMMANDS[run.command][2])
    for run in runs:
        if not run.right:
            results.misses.append(f"{run.command} on {run.size} of {run.layers} layers: found at {run.found}")
    for table, misses in law_tables(runs, SHALLOW):
        results.add(table)
        results.misses += misses
    if len({run.size for run in full}) > 1:
        results.plot(drawn(full))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
