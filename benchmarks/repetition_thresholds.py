"""How repetitive honest text gets: the numbers behind the thresholds of `aprjax.text.repetition`.

    python benchmarks/repetition_thresholds.py MODEL.gguf

Python's standard library, encoded by the model's tokenizer, in windows begun anywhere. For each length of window:
tokens of the longest loop at the end with two and with three copies, of the longest with three anywhere, the share
of distinct 4-grams, and how many windows earn a grade.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

from aprjax.checkpoint import open_checkpoint
from aprjax.text import Tokenizer
from aprjax.text.repetition import find_loops, measure_repetition

LENGTHS, WINDOWS, SUBMODULES = (16, 24, 32, 64, 128, 256), 2500, 200


def corpus(tokenizer: Tokenizer) -> list[list[int]]:
    """The library's top-level modules and the first of its packages' modules, in tokens."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))[:SUBMODULES]]
    return [tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")) for file in files]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    texts = corpus(Tokenizer.from_checkpoint(open_checkpoint(arguments[0])))
    chosen = random.Random(1)
    print(
        f"{len(texts)} modules, {WINDOWS} windows of each length; quantiles 99 %, 99.9 %, 100 % (shares: 1, 0.1, 0 %)"
    )
    for length in LENGTHS:
        rows, grades = [], Counter()
        while len(rows) < WINDOWS:
            text = chosen.choice(texts)
            if len(text) > length:
                start = chosen.randrange(len(text) - length)
                window = np.asarray(text[start : start + length])
                two, inner = find_loops(window)
                three = two if two is not None and two.copies >= 3 else None
                found = measure_repetition(window)
                grades[found.grade] += 1
                rows.append(
                    (*(0 if loop is None else loop.tokens for loop in (two, three, inner)), found.distinct_share)
                )
        values = np.array(rows)
        parts = [f"{length:4} tokens"]
        for column, name in enumerate(("2 copies at the end", "3 at the end", "3 anywhere")):
            parts.append(f"{name} {' '.join(f'{q:g}' for q in np.quantile(values[:, column], [0.99, 0.999, 1]))}")
        parts.append(f"distinct {' '.join(f'{q:.3f}' for q in np.quantile(values[:, 3], [0.01, 0.001, 0]))}")
        parts.append(f"mild {grades['mild']}, degenerate {grades['degenerate']}")
        print("; ".join(parts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
