"""The fault bench: every registered fault is planted, and the toolkit must say where it is and what it is.

    python benchmarks/faults/bench.py --out benchmarks/results/DATE-faults.jsonl [--model tiny --model 0.5b …]

One line of JSON per case, written as soon as it is judged; cases that the file holds already are left out, so an
interrupted run goes on where it stopped. `table.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import Case, file_cases, mha_cases
from container import PlantError
from judging import Result, judge_file
from small_model import TINY, TINY_MHA, write_small
from workshop import Workshop

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.fetch import model_location
from aprjax.qwen2.compilation import enable_compilation_cache

MODELS = ("tiny", "tiny-mha", "0.5b", "1.5b")
# Those of tests/bisect/test_layers.py, below the vocabulary of the small model.
TINY_TOKENS = (5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7)
# "What is 2+2?" of Qwen2.5.
REAL_TOKENS = (3838, 374, 220, 17, 10, 17, 30)


def workshop(name: str, folder: Path) -> Workshop:
    """The model, its clean copy to plant faults in, and the reference."""
    if name.startswith("tiny"):
        path = write_small(folder / f"{name}.gguf", TINY_MHA if name == "tiny-mha" else TINY)
        convert(path, folder / f"{name}.apr")
        return Workshop(name, folder / f"{name}.apr", open_checkpoint(path), folder, TINY_TOKENS)
    path = model_location(f"qwen2.5-coder-{name}")
    clean = path
    if name == "1.5b":
        clean = folder / "1.5b.apr"
        convert(path, clean)
    return Workshop(name, clean, open_checkpoint(path), folder, REAL_TOKENS)


def single_cases(shop: Workshop, *, few: bool) -> Iterator[Case]:
    """Faults of files for a model: all of them, or each once or twice where a case takes seconds."""
    if shop.name == "tiny-mha":
        yield from mha_cases(range(shop.layers))
        return
    last = shop.layers - 1
    chosen = range(shop.layers) if shop.name == "tiny" else (0, shop.layers // 2, last)
    yield from file_cases(shop.name, list(chosen), few=few or shop.name != "tiny")


def judge(shop: Workshop, case: Case) -> Result | None:
    """The result of a case; None where the fault does not exist in this model."""
    try:
        return judge_file(shop, case, bounds=shop.name in ("0.5b", "1.5b"))
    except PlantError as error:
        print(f"left out: {case.key}: {error}", file=sys.stderr)
        return None


def done_before(path: Path) -> set[str]:
    """Keys of the cases that a file of results holds."""
    if not path.exists():
        return set()
    return {json.loads(line)["case"]["key"] for line in path.read_text(encoding="utf-8").splitlines()}


def run(shop: Workshop, cases: Sequence[Case], out: Path) -> None:
    """Judges the cases that are not done, and appends their results."""
    before = done_before(out)
    todo = [case for case in cases if case.key not in before]
    start = time.perf_counter()
    with out.open("a", encoding="utf-8") as stream:
        for index, case in enumerate(todo):
            result = judge(shop, case)
            if result is None:
                continue
            stream.write(json.dumps(result.to_json(), default=float) + "\n")
            stream.flush()
            good = result.localised is not False and result.explained is not False and not result.false_alarm
            state = "ok" if good else f"MISS {result.reason[:160]}"
            print(f"{time.perf_counter() - start:7.1f} s {index + 1}/{len(todo)} {case.key}: {state}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--fault", action="append", help="only these faults")
    parser.add_argument("--layer", type=int, action="append", help="only these layers")
    parser.add_argument("--few", action="store_true", help="each fault once or twice")
    parser.add_argument("--folder", type=Path, help="for faulty copies; a temporary one by default")
    options = parser.parse_args()
    enable_compilation_cache()
    with tempfile.TemporaryDirectory(prefix="aprjax-", dir=options.folder) as folder:
        for name in options.model or MODELS:
            shop = workshop(name, Path(folder))
            cases = [
                case
                for case in single_cases(shop, few=options.few)
                if (not options.fault or case.fault in options.fault)
                and (not options.layer or case.layer in options.layer)
            ]
            run(shop, cases, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
