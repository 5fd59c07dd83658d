"""How long a user waits before anything happens: `--help`, and importing aprjax.

    python benchmarks/bench_start.py [--repeats 7]

Each run is a process of its own, from its start to its end. Exits with 1
above the project's bars.
"""

from __future__ import annotations

import sys

from measured import Results, Table, least_of, measure, parser

# Issue "Fast, and at full size", acceptance 1: wall seconds.
MOST_HELP, MOST_IMPORT = 0.3, 0.1
NO_JAX = "import sys, aprjax; assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    arguments = options.parse_args()
    results = Results("start", "Processes from start to end, the least of some runs.", arguments.out)
    runs = {
        "python -c pass": ["-c", "pass"],
        "import aprjax, without jax": ["-c", NO_JAX],
        "python -m bisect --help": ["-m", "bisect", "--help"],
        "python -m aprjax --help": ["-m", "aprjax", "--help"],
        "python -m aprjax layers --help": ["-m", "aprjax", "layers", "--help"],
    }
    found: dict[str, list] = {name: [] for name in runs}
    for _ in range(1 + arguments.repeats):
        for name, command in runs.items():
            found[name].append(measure([sys.executable, *command]))
    least = {name: least_of(measured[1:]) for name, measured in found.items()}
    rows = [(name, one.wall, one.processor, one.peak_gb * 1e3) for name, one in least.items()]
    results.add(Table("Start", ("command", "wall s", "processor s", "peak MB"), rows))
    results.bar("--help, wall s", least["python -m aprjax --help"].wall, at_most=MOST_HELP)
    own = least["import aprjax, without jax"].wall - least["python -c pass"].wall
    results.bar("import aprjax, wall s beyond Python's own", own, at_most=MOST_IMPORT)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
