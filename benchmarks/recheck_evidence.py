"""The cheapest part of older evidence, computed again with the code at hand.

    python benchmarks/recheck_evidence.py evidence/margins-DATE
    python benchmarks/recheck_evidence.py evidence/generation-parity-DATE [--prompts 3]

Of margins: the direct prompt under one arithmetic, every position's margin and loss beside those of the JSON. Of
generation: the first prompts of the 0.5B by the preset whose bits are the engine's. What came out is written to
`recheck.json`, and the folder's page is made anew; the numbers that stand there stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import generation_parity
import margins_evidence

ROOT = Path(__file__).resolve().parents[1]
NAME = "recheck.json"


def commit(path: Path | None = None) -> str:
    """The commit that last changed a file; of the tree, where none is given."""
    asked = ["git", "log", "-1", "--format=%h", *(["--", str(path.resolve())] if path else [])]
    return subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def margins(folder: Path, model: str) -> dict[str, Any]:
    """The direct prompt's positions under one arithmetic, again."""
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import fetch
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.model import Qwen2

    source = folder / "direct-equal-arithmetic.json"
    run = json.loads(source.read_text(encoding="utf-8"))
    file = open_checkpoint(fetch(model, None, lambda what, done, total: None))
    if file.sha256() != run["sides"]["ref"]["sha256"]:
        raise SystemExit(f"error: {file.path.name} is not the file of {source}")
    ids = [*run["fed"]["prompt"], *run["fed"]["continuation"]]
    logits = np.asarray(Qwen2(file, PRESETS["llama.cpp"])(ids)).astype(np.float64)
    best = np.sort(np.partition(logits, -2, axis=1)[:, -2:], axis=1)
    largest = logits.max(axis=1)
    normal = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    rows = [row for row in run["tokens"] if row["target"] is not None]
    at = [row["position"] for row in rows]
    losses = normal[at] - logits[at, [row["target"] for row in rows]]
    every = [row["position"] for row in run["tokens"]]
    told = np.array([row["ref"]["margin"] for row in run["tokens"]])
    top = np.array([row["ref"]["top1"] for row in run["tokens"]])
    changed = np.abs((best[:, 1] - best[:, 0])[every] - told)
    return {
        "of": source.name,
        "made_at": commit(source),
        "again_at": commit(),
        "sides": {"ref": {"sha256": file.sha256()}},
        "positions": len(every),
        "same_top1": int((logits[every].argmax(axis=1) == top).sum()),
        "largest_margin_change": float(changed.max()),
        "rms_margin_change": float(np.sqrt(np.square(changed).mean())),
        "perplexity": float(np.exp(losses.mean())),
        "perplexity_then": float(np.exp(np.mean([row["ref_loss"] for row in rows]))),
    }


def generation(folder: Path, count: int) -> dict[str, Any]:
    """The first prompts of the 0.5B by the exact preset, again."""
    from aprjax.bisect.generate.sides import LocalGenerator
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import model_location
    from aprjax.qwen2.arithmetic import preset

    source = folder / "llama.cpp-exact-0.5b.json"
    then = json.loads(source.read_text(encoding="utf-8"))
    reference = json.loads((folder / "llama.cpp-0.5b.json").read_text(encoding="utf-8"))
    file = open_checkpoint(model_location(generation_parity.MODELS["0.5b"]))
    if file.sha256() != then["sha256"]:
        raise SystemExit(f"error: {file.path.name} is not the file of {source}")
    side, rows = LocalGenerator(file, preset(then["arithmetic"])), []
    # The shortest first: what counts are their 128 tokens.
    for prompt in sorted(reference["prompts"], key=lambda one: len(one["prompt_tokens"]))[:count]:
        found = generation_parity.verify(prompt, side)
        rows.append({key: found[key] for key in ("name", "equal_tokens", "steps_with_equal_top_two_logits")})
    return {
        "of": source.name,
        "made_at": commit(source),
        "again_at": commit(),
        "arithmetic": then["arithmetic"],
        "prompts": rows,
    }


def main() -> int:
    from aprjax.qwen2.compilation import enable_compilation_cache

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="of margins")
    parser.add_argument("--prompts", type=int, default=3, help="of generation: how many")
    options = parser.parse_args()
    enable_compilation_cache()
    folder: Path = options.folder
    if (folder / "direct-equal-arithmetic.json").exists():
        found = margins(folder, options.model)
    else:
        found = generation(folder, options.prompts)
    (folder / NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    if "positions" in found:
        page = margins_evidence.readme(margins_evidence.found_in(folder))
    else:
        page = generation_parity.readme(*generation_parity.found_in(folder), generation_parity.rechecked(folder))
    (folder / "README.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
