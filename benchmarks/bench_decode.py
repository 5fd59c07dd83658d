"""Speed of `dequantize` against gguf-py, and of the encoders, in one run.

python benchmarks/bench_decode.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

ROWS, COLUMNS = 1024, 1536


def seconds(run: Callable[[], object]) -> float:
    """Best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    import gguf

    from aprjax.blocks import FORMATS, dequantize, encode

    rng = np.random.default_rng(0)
    values = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    print("type   decode Melements/s  times gguf-py  encode Melements/s")
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        blocks = FORMATS[name]
        data = rng.integers(0, 60, (ROWS * COLUMNS // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
        flat = data.reshape(-1)
        kind = gguf.GGMLQuantizationType[name]
        mine = seconds(lambda name=name, flat=flat: dequantize(name, flat, (ROWS, COLUMNS)))
        theirs = seconds(lambda data=data, kind=kind: gguf.quants.dequantize(data, kind))
        speed = ""
        if blocks.encode is not None:
            speed = f"{values.size / seconds(lambda name=name: encode(name, values)) / 1e6:.0f}"
        print(f"{name}  {values.size / mine / 1e6:19.0f}  {theirs / mine:13.1f}  {speed:>18}", flush=True)


if __name__ == "__main__":
    main()
