"""`explain` on a large model, once for each kind of side: what it finds, its time, and its memory.

    python benchmarks/faults/explain_cost.py [--model qwen2.5-coder-1.5b] [--apr FILE.apr] [--out FILE.json]

*trace*: a copy of the conversion whose header holds another epsilon runs and is saved as a trace, which the sound file
explains. *live*: llama.cpp runs the GGUF file, told by its own parameter to rotate by another base; that file explains
it. Each runs in a process of its own, whose largest resident set is its memory. Exits with 1 where a cause is missed,
or its number is off by more than 0.1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "What is 2+2?"
# What is planted, and the explanation with the number that must be found.
EPSILON, BASE = 1e-5, 1e4
EXPECTED = {"trace": ("rms-eps", "rms_norm_eps", EPSILON), "live": ("rope-theta", "rope_theta", BASE)}
# The bound for fitted numbers.
TOLERANCE = 1e-3


def faulty_trace(apr: Path, folder: Path) -> Path:
    """A trace of a copy that was run with another epsilon."""
    from container import AprFile

    from aprjax.checkpoint import open_checkpoint
    from aprjax.qwen2 import PRESETS
    from aprjax.text import Tokenizer
    from aprjax.trace import save
    from aprjax.trace.sides import run_checkpoint

    file = AprFile.read(apr)
    file.set_key("rms_norm_eps", EPSILON)
    file.write(folder / "faulty.apr")
    faulty = open_checkpoint(folder / "faulty.apr")
    tokens = list(Tokenizer.from_checkpoint(faulty).encode(PROMPT))
    save(run_checkpoint(faulty, tokens, PRESETS["llama.cpp"]), folder / "trace.safetensors")
    (folder / "faulty.apr").unlink()
    return folder / "trace.safetensors"


def run_by_another_base() -> None:
    """From here on, llama.cpp's child process rotates by `BASE`."""
    from aprjax.trace import llama_cpp

    run, script = subprocess.run, ROOT / "tests" / "real" / "llama_otherwise.py"

    def otherwise(arguments: list[str], **options: Any) -> Any:
        return run([sys.executable, str(script), str(BASE), "1e-6"], **options)

    llama_cpp.subprocess.run = otherwise  # type: ignore[assignment]


def peak_kib() -> int:
    """This process's largest resident set; `ru_maxrss` would have its parent's, too, which a started program keeps."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(kind: str, apr: Path, gguf: Path, folder: Path) -> dict[str, Any]:
    """One kind of side, in this process."""
    from aprjax.bisect.explain.command import explain_side

    if kind == "live":
        run_by_another_base()
    side = str(folder / "trace.safetensors") if kind == "trace" else f"llama.cpp:{gguf}"
    start, processor = time.perf_counter(), time.process_time()
    asked: dict[str, Any] = {"prompt": PROMPT} if kind == "live" else {"force_file": True}
    found = explain_side(side, apr if kind == "trace" else gguf, **asked)
    spent = {"wall": time.perf_counter() - start, "processor": time.process_time() - processor}
    slug, name, number = EXPECTED[kind]
    first = found.explanations[0] if found.explanations else None
    told = None if first is None else first.parameters.get(name)
    value = float(getattr(told, "value", told) or 0.0)
    right = first is not None and first.id == slug
    return {
        "side": kind,
        "right": right and found.explained and math.isclose(value, number, rel_tol=TOLERANCE),
        "explained": found.explained,
        "found": [one.sentence for one in found.explanations],
        "residuals": [[one.before, one.residual] for one in found.explanations],
        "planted": {name: number},
        "seconds": {key: round(seconds, 1) for key, seconds in spent.items()},
        "parts": found.to_json()["seconds"],
        "gib": round(peak_kib() / 2**20, 2),
    }


def main() -> int:
    """Measures both, each in a child, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--apr", type=Path, help="the conversion, if it is at hand")
    parser.add_argument("--side", choices=tuple(EXPECTED), help="only this one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import model_location

    gguf = model_location(options.model)
    if options.child is not None:
        print(json.dumps(measure(options.side, options.apr, gguf, options.child)))
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        folder = Path(name)
        apr = options.apr or folder / "clean.apr"
        if options.apr is None:
            convert(gguf, apr, keep_blocks=True)
        for side in [options.side] if options.side else EXPECTED:
            if side == "trace":
                faulty_trace(apr, folder)
            command = [sys.executable, __file__, "--child", name, "--side", side, "--apr", str(apr)]
            child = subprocess.run([*command, "--model", options.model], check=True, capture_output=True, text=True)
            results.append(json.loads(child.stdout.splitlines()[-1]))
            print(json.dumps(results[-1], indent=1, ensure_ascii=False), flush=True)
            if options.out is not None:
                document = {"model": options.model, "prompt": PROMPT, "sides": results}
                options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(found["right"] for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
