"""The massive activation of Qwen2.5-Coder-1.5B, and what eight-bit activations make of it, against float64.

    python evidence/massive-activation-2026-11-23/measure.py

writes `result.json` and `result.png` beside this file. `README.md` tells what is in them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from measure_plot import save_plot
from measure_report import PROMPTS, assemble
from measure_run import (
    ARITHMETICS,
    CHANNEL,
    FIRST,
    FLOAT64,
    LAYER,
    MASSIVE,
    PROMPT,
    feed_forward,
    logits,
    make_batch,
    run,
)

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.fetch import model_location
from aprjax.qwen2 import Stage
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.text import wrap

HERE = Path(__file__).resolve().parent
MODEL = "qwen2.5-coder-1.5b"


def main() -> None:
    """Measures, and writes `result.json` and `result.png`."""
    parser = argparse.ArgumentParser(description="The massive activation of Qwen2.5-Coder-1.5B against float64.")
    parser.add_argument("--model", type=Path, default=model_location(MODEL), help="the GGUF file, q4_k_m")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write result.json and result.png")
    arguments = parser.parse_args()
    start = time.perf_counter()
    enable_compilation_cache()
    checkpoint = open_checkpoint(arguments.model)
    batch = make_batch(checkpoint, {"raw": PROMPT, "ChatML": wrap(PROMPT, "once")}, FIRST)
    kept = run(checkpoint, batch, tuple(ARITHMETICS), layers=checkpoint.config.num_layers)
    rows = np.concatenate([batch.rows(name) for name in PROMPTS])
    heads = {
        name: logits(checkpoint, layers[-1][Stage.POST_FFN_RESIDUAL][rows], ARITHMETICS.get(name, FLOAT64))
        for name, layers in kept.items()
    }
    blocks = {
        name: feed_forward(checkpoint, kept["float64"][LAYER][Stage.FFN_NORM][batch.first(name)])
        for name in batch.names
        if abs(kept["float64"][LAYER][Stage.FFN_NORM][batch.first(name), CHANNEL]) >= MASSIVE
    }
    document = assemble(checkpoint, batch, kept, heads, blocks)
    document["seconds"] = {
        "wall": round(time.perf_counter() - start, 1),
        "processor": round(time.process_time(), 1),
    }
    with atomic_file(arguments.out / "result.json") as stream:
        stream.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode("ascii"))
    with atomic_file(arguments.out / "result.png") as stream:
        save_plot(document, stream)


if __name__ == "__main__":
    main()
