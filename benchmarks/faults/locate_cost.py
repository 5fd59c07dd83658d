"""`locate` on a real pair with planted faults: the places it names, its forward passes, and `layers`' linear scan.

    python benchmarks/faults/locate_cost.py [--model qwen2.5-coder-1.5b] [--apr FILE.apr] [--scan] [--out FILE.json]

The pair is the GGUF file and its conversion to APR with the blocks kept; each case plants its faults in a copy of that
conversion (`benchmarks/faults/plant.py`, which shares no code with what finds them). Both sides run in llama.cpp's
arithmetic. Exits with 1 where a place is wrong, differs from the scan's, or costs more than 12 passes of a side.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from container import AprFile
from plant import FAULTS
from planted import Request

# Issue "Find the cause", acceptance 2: 2 log2(28) for the layers, and the stages.
MOST_PASSES = 12
PROMPT = "What is 2+2?"
# A tensor of a middle layer, a config key, a tensor of a late layer, and two tensors at once.
CASES: dict[str, list[tuple[str, Request]]] = {
    "middle layer": [("norm-scaled", Request(layer=13))],
    "config key": [("rope-theta", Request())],
    "late layer": [("scale-bits-dropped", Request(tensor="model.layers.26.mlp.up_proj.weight"))],
    "two tensors": [("norm-scaled", Request(layer=5)), ("o-proj-transposed", Request(layer=20))],
}


def planted(source: Path, target: Path, faults: list[tuple[str, Request]]) -> list[dict[str, Any]]:
    """Writes a copy with the faults; where they must show."""
    file = AprFile.read(source)
    expected = [{"fault": name, **FAULTS[name](file, request).expected()} for name, request in faults]
    file.write(target)
    return expected


def measure(apr: Path, gguf: Path, case: str, folder: Path, *, scan: bool) -> dict[str, Any]:
    """One case: planted, located, and (if `scan`) every stage compared in order by `layers`."""
    from aprjax.bisect.asked_pair import Question, asked_pair, open_sides_of
    from aprjax.bisect.layers.compare import layers
    from aprjax.bisect.locate.run import locate
    from aprjax.bisect.lockstep import Runner

    faulty = folder / "faulty.apr"
    expected = planted(apr, faulty, CASES[case])
    question = Question(prompt=PROMPT, arithmetic="llama.cpp", positions="all")
    with asked_pair(open_sides_of(str(faulty), str(gguf)), question) as pair:
        assert isinstance(pair.model, Runner)
        options = {"tokens": pair.tokens, "positions": pair.positions, "files": pair.files}
        start = time.process_time()
        found = locate(pair.model, pair.ref, **options)
        middle = time.process_time()
        divergence = layers(pair.model, pair.ref, **options).first_divergence if scan else None
        end = time.process_time()
    faulty.unlink()
    places = [{"layer": fault.layer, "stage": str(fault.stage)} for fault in found.faults]
    first = None if divergence is None else {"layer": divergence.layer, "stage": str(divergence.stage)}
    wanted = [{key: place[key] for key in ("layer", "stage")} for place in expected]
    return {
        "case": case,
        "planted": expected,
        "located": [{**place, "cause": fault.cause} for place, fault in zip(places, found.faults, strict=True)],
        "first_of_the_scan": first,
        "right": places == wanted and (first == wanted[0] or not scan),
        "runs": {side: spent["runs"] for side, spent in found.passes.items()},
        "passes": {side: spent["passes"] for side, spent in found.passes.items()},
        "processor_seconds": {"locate": round(middle - start, 1), "layers": round(end - middle, 1)},
    }


def main() -> None:
    """Writes the JSON and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--apr", type=Path, help="the conversion, if it is at hand")
    parser.add_argument("--scan", action="store_true", help="compare with the linear scan of `layers`")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import model_location

    gguf = model_location(options.model)
    results = []
    print("case           runs (model, ref)   passes (model, ref)   located")
    with tempfile.TemporaryDirectory() as name:
        apr = options.apr or Path(name) / "clean.apr"
        if options.apr is None:
            convert(gguf, apr, keep_blocks=True)
        for case in CASES:
            found = measure(apr, gguf, case, Path(name), scan=options.scan)
            results.append(found)
            runs, passes = found["runs"], found["passes"]
            places = ", ".join(f"{place['layer']} {place['stage']}" for place in found["located"])
            print(
                f"{case:14} {runs['model']:8.0f} {runs['ref']:8.0f} {passes['model']:12.1f} {passes['ref']:8.1f}   "
                f"{places}{'' if found['right'] else '   WRONG'}",
                flush=True,
            )
            if options.out is not None:
                document = {"model": options.model, "prompt": PROMPT, "cases": results}
                options.out.write_text(json.dumps(document, indent=1) + "\n")
    good = all(found["right"] and max(found["passes"].values()) <= MOST_PASSES for found in results)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
