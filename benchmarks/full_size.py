"""`layers`, `locate` and `attribute` on full-size pairs with one planted fault: time, processor time and peak memory.

    python benchmarks/full_size.py --sizes 1.5b 7b [--commands layers locate attribute] [--tokens 64] [--folder DIR]

The pairs are random weights in the shapes and block types of the real models (`synthetic.py`), the reference as GGUF,
the model as APR with one fault (`faults/plant.py`). Each command is a process of its own, on all tokens and stages, and
says where it finds the fault. Peak memory is what the system reports for the process, pages of mapped files that are
still resident included. With two sizes and more, the last lines compare them: seconds for a billion parameters. A 7B
pair takes 14 GB of disk while it is made, and 9.4 GB afterwards; what was made is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from synthetic import SHAPES, config_of, random_tensors, write_synthetic

from aprjax.checkpoint.types import ModelConfig

PLANT = Path(__file__).resolve().parent / "faults" / "plant.py"

# The last layers too are run, and so most of them are behind the fault: what `locate` searches and `attribute` crosses.
FAULT, DEPTH = "k-bias-zero", 0.3
COMMANDS = ("layers", "layers --arithmetic float32", "locate", "attribute")
# 0 agree (`attribute`'s gap is small), 1 a divergence was found.
EXPECTED = {"layers": (1,), "locate": (1,), "attribute": (0, 1)}


@dataclass(frozen=True)
class Measured:
    """One command on one pair.

    Attributes:
        size: of the model.
        command: what ran.
        parameters: of one side.
        tokens: that both sides were fed.
        seconds: wall time.
        cpu_seconds: of all threads and children.
        peak_bytes: the largest resident size.
        code: the exit code.
        found: where the fault was found.
    """

    size: str
    command: str
    parameters: int
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int
    found: str


def make_pair(folder: Path, size: str, config: ModelConfig, vocabulary: Path | None) -> tuple[Path, Path, dict]:
    """(reference, model with the fault, what was planted); files that are there already are taken."""
    ref, clean, faulty = (folder / f"{size}{suffix}" for suffix in (".gguf", ".apr", "-faulty.apr"))
    planted = folder / f"{size}-planted.json"
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


def measure(command: str, ref: Path, model: Path, tokens: list[int], folder: Path) -> tuple[Measured, dict]:
    """Runs one command as a process; its numbers and its report."""
    words = command.split()
    report = folder / "report.json"
    ids = ",".join(map(str, tokens))
    line = [sys.executable, "-m", "aprjax", *words, "--model", str(model), "--ref", str(ref), "--tokens", ids]
    start = time.perf_counter()
    with subprocess.Popen([*line, "--json", str(report)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode not in EXPECTED[words[0]]:
        raise SystemExit(f"{' '.join(line)} exited with {process.returncode}")
    numbers = Measured(
        size="",
        command=command,
        parameters=0,
        tokens=len(tokens),
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        code=process.returncode,
        found="",
    )
    return numbers, json.loads(report.read_text())


def where(report: dict) -> str:
    """The layer and stage that a report accuses."""
    if "faults" in report:  # locate
        first = (report["faults"] or [{}])[0]
    else:
        first = report.get("first_divergence") or (report.get("contributions") or [{}])[0]
    return f"layer {first.get('layer')} {first.get('stage')}"


def main() -> None:
    """Prints a line for each size and command, and appends the numbers as JSON lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.5b", "7b"])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the sizes have, to try it out")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="a checkpoint whose vocabulary is copied")
    parser.add_argument("--folder", type=Path, help="where the files are made; by default the system's for such")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="make the files here, leave them, take those there are"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the numbers here, a line for each run")
    options = parser.parse_args()
    measured: list[Measured] = []
    print("size   tokens  command                        wall s    CPU s  peak GiB   found", flush=True)
    for size in options.sizes:
        config = config_of(size, layers=options.layers)
        parameters = sum(math.prod(tensor.shape) for tensor in random_tensors(config, 0))
        tokens = np.random.default_rng(0).integers(0, 256, options.tokens).tolist()
        with contextlib.ExitStack() as stack:
            name = options.keep
            if name is None:
                name = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, prefix="aprjax-"))
            ref, model, expected = make_pair(Path(name), size, config, options.vocabulary)
            for command in options.commands:
                numbers, report = measure(command, ref, model, tokens, Path(name))
                one = Measured(**{**asdict(numbers), "size": size, "parameters": parameters, "found": where(report)})
                measured.append(one)
                right = f"layer {expected['layer']} {expected['stage']}" == one.found
                print(
                    f"{size:6} {one.tokens:6}  {command:28} {one.seconds:8.1f} {one.cpu_seconds:8.1f} "
                    f"{one.peak_bytes / 2**30:9.2f}   {one.found}{'' if right else f', planted: {expected}'}",
                    flush=True,
                )
                if options.json is not None:
                    with options.json.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(asdict(one)) + "\n")
    for command in options.commands:
        rates = [(m.size, m.cpu_seconds / m.parameters * 1e9) for m in measured if m.command == command]
        if len(rates) > 1:
            said = ", ".join(f"{size} {rate:.1f}" for size, rate in rates)
            print(f"{command}: CPU s for a billion parameters: {said}; last to first {rates[-1][1] / rates[0][1]:.2f}")


if __name__ == "__main__":
    main()
