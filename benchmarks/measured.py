"""What the benchmarks share: clocks, processes measured from outside, tables, and the files that they are written to.

A script makes `Table`s and hands them to `Results`, which prints them and writes `DATE-NAME.md` and `DATE-NAME.json`
with the machine, the versions and the command. Other work only ever makes a run slower, so the least of some runs
counts, and the two sides of a ratio take turns within one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = "aprjax.benchmark/1"
FOLDER = Path(__file__).parent / "results"
_LIBRARIES = ("aprjax", "jax", "jaxlib", "flax", "numpy", "gguf", "llama-cpp-python", "transformers", "torch")
# The plain build's tiles are another order of sums, which only some of its versions have.
PLAIN_LLAMA = {"GGML_CPU_TILED_MM": "0"}


@dataclass
class Least:
    """The least wall and processor seconds of some runs."""

    wall: float = float("inf")
    processor: float = float("inf")

    def of(self, run: Callable[[], Any]) -> Any:
        """Runs once more, waits for JAX's arrays, and returns what came of it."""
        wall, processor = time.perf_counter(), time.process_time()
        result = run()
        if "jax" in sys.modules:
            sys.modules["jax"].block_until_ready(result)
        self.seen(time.perf_counter() - wall, time.process_time() - processor)
        return result

    def seen(self, wall: float, processor: float) -> None:
        """One more run, measured elsewhere."""
        self.wall, self.processor = min(self.wall, wall), min(self.processor, processor)


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Least]:
    """Every run once uncounted (it compiles, and fills caches), then all of them in turn."""
    least = {name: Least() for name in runs}
    for run in runs.values():
        Least().of(run)
    for _ in range(repeats):
        for name, run in runs.items():
            least[name].of(run)
    return least


@dataclass(frozen=True)
class Process:
    """A process and its children, measured from outside; the peak is of all of them together."""

    wall: float
    processor: float
    peak_gb: float
    said: str


def measure(
    command: Sequence[str], environment: Mapping[str, str] | None = None, codes: tuple[int, ...] = (0,)
) -> Process:
    """Runs a command, which must exit with one of `codes`."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        ended, peaks = threading.Event(), [0.0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        watcher.start()
        said = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
    if process.returncode not in codes:
        raise SystemExit(f"{' '.join(command)[:200]} exited with {process.returncode}: {said[-500:]}")
    # Without Linux's /proc what is left is a count that begins with this process's own size.
    peak = peaks[0] or usage.ru_maxrss * 1.024e-6
    return Process(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak, said)


def _watch(pid: int, peaks: list[float], ended: threading.Event) -> None:
    """Keeps `peaks[0]`, in GB, at the largest size of a process and its children at one time.

    Its own is exact but for the last 20 ms; together with children it is the largest of a look every 20 ms.
    """
    while not ended.wait(0.02):
        with contextlib.suppress(OSError, StopIteration):
            own = _status(pid, "VmHWM")
            peaks[0] = max(peaks[0], own, sum(_resident(pid)))


def _resident(pid: int) -> Iterator[float]:
    """Of a process and all below it; one that ends meanwhile counts nothing."""
    with contextlib.suppress(OSError, StopIteration):
        yield _status(pid, "VmRSS")
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text(encoding="utf-8").split():
                yield from _resident(int(child))


def _status(pid: int, name: str) -> float:
    """In GB, from KiB, which Linux calls kB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1.024e-6


def least_of(measured: Sequence[Process]) -> Process:
    """The least wall and processor seconds, and the largest peak."""
    return Process(
        min(one.wall for one in measured),
        min(one.processor for one in measured),
        max(one.peak_gb for one in measured),
        measured[-1].said,
    )


@dataclass(frozen=True)
class Table:
    """Numbers with a heading, and what has to be known about them.

    Attributes:
        title: of the section.
        columns: names, with units.
        rows: a text or number for each column; None where nothing was measured.
        note: a paragraph below.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""

    def cells(self) -> list[tuple[str, ...]]:
        """Everything as text, the columns' names first."""
        return [self.columns, *(tuple(map(shown, row)) for row in self.rows)]

    def text(self) -> str:
        """For a terminal."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join([self.title, *aligned, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """A section."""
        first, *rest = ("| " + " | ".join(row) + " |" for row in self.cells())
        rule = "|" + "---|" + "---:|" * (len(self.columns) - 1)
        return "\n".join([f"## {self.title}", "", first, rule, *rest, *(["", self.note] if self.note else [])])


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


@dataclass
class Results:
    """What one benchmark found.

    Attributes:
        name: of the files that it is written to.
        about: what was compared, and how.
        tables: in the order in which they were added.
        figures: the file names of plots.
        misses: bars that were not reached.
    """

    name: str
    about: str
    folder: Path = FOLDER
    tables: list[Table] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    started: list[float] = field(default_factory=lambda: list(os.getloadavg()))

    def add(self, table: Table) -> None:
        """Keeps a table, and prints it."""
        self.tables.append(table)
        print(table.text(), end="\n\n", flush=True)

    def bar(self, what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Holds a number against the project's bar."""
        if (at_least is not None and not value >= at_least) or (at_most is not None and not value <= at_most):
            limit = f"at least {shown(at_least)}" if at_least is not None else f"at most {shown(at_most)}"
            self.misses.append(f"{what}: {shown(value)}, expected {limit}")

    def plot(self, figure: Any, suffix: str = "") -> None:
        """Saves a matplotlib figure beside the tables."""
        name = f"{self._stem()}{suffix}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / name, dpi=120)
        self.figures.append(name)

    def _stem(self) -> str:
        return f"{time.strftime('%Y-%m-%d')}-{self.name}"

    def finish(self) -> int:
        """Writes both files; the exit code, which is 1 where a bar was missed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {
            "schema": SCHEMA,
            "benchmark": self.name,
            "about": self.about,
            "command": command_line(),
            "machine": machine(),
            "versions": versions(),
            "integer_products": integer_products(),
            "load_average": {"start": self.started, "end": list(os.getloadavg())},
            "tables": [asdict(table) for table in self.tables],
            "figures": self.figures,
            "misses": self.misses,
        }
        target = self.folder / self._stem()
        target.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(_page(document, self.tables), encoding="utf-8")
        for miss in self.misses:
            print(f"missed: {miss}")
        return 1 if self.misses else 0


def _page(document: Mapping[str, Any], tables: Sequence[Table]) -> str:
    found, load = document["machine"], document["load_average"]
    made = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    head = [
        f"# Benchmark: {document['benchmark']}",
        "",
        f"`{document['command']}`, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
        "",
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']:.0f} GB; {made}; load average "
        f"{load['start'][0]:.1f} at the start, {load['end'][0]:.1f} at the end; integer products by "
        f"{document['integer_products']}.",
        "",
        document["about"],
        "",
    ]
    parts = [table.markdown() + "\n" for table in tables]
    parts += [f"![{name}]({name})\n" for name in document["figures"]]
    if document["misses"]:
        parts.append("## Missed\n\n" + "\n".join(f"- {miss}" for miss in document["misses"]) + "\n")
    return "\n".join([*head, *parts])


def command_line() -> str:
    """What was typed, without this machine's folders."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(part).name for part in sys.argv[1:])])


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and memory."""
    name, memory = platform.processor() or platform.machine(), 0.0
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (OSError, ValueError):
        pass
    return {"processor": name, "cores": cores(), "memory_gb": memory, "system": platform.platform()}


def cores() -> int:
    """Cores that this process may use: `taskset` counts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def integer_products() -> str:
    """What computes them in the processes of a benchmark, which all have this environment."""
    from aprjax.qwen2.native import native_products

    return "the kernel of our own" if native_products().target else "XLA"


def versions() -> dict[str, str]:
    """Of Python and of what is installed."""
    found = {"Python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def parser(about: str | None) -> argparse.ArgumentParser:
    """With the option that every benchmark has."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where tables and plots are written")
    return made
