"""Decoding and encoding blocks: `dequantize` here, in gguf-py and in ggml, in one run.

    python benchmarks/bench_decode.py [--repeats 5]

ggml decodes on one thread. Speeds are millions of elements per second of processor time, so that they mean something
beside other work, too.
"""

from __future__ import annotations

import sys

import numpy as np
from ggml import Ggml
from measured import Results, Table, in_turns, parser

from aprjax.blocks import FORMATS, dequantize, encode

ROWS, COLUMNS = 1024, 1536
NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def main() -> int:
    import gguf

    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    results = Results("blocks", "Decoding and encoding of blocks, single matrices in memory.", arguments.out)
    rng, ggml, rows = np.random.default_rng(0), Ggml.load(), []
    values = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    for name in NAMES:
        blocks = FORMATS[name]
        data = rng.integers(0, 60, (ROWS * COLUMNS // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
        kind, flat = gguf.GGMLQuantizationType[name], data.reshape(-1)
        runs = {
            "aprjax": lambda name=name, flat=flat: dequantize(name, flat, (ROWS, COLUMNS)),
            "gguf-py": lambda data=data, kind=kind: gguf.quants.dequantize(data, kind),
            "ggml": ggml.decoder(blocks.ggml_id, flat, values.size),
        }
        assert np.array_equal(runs["aprjax"]().ravel(), runs["ggml"](), equal_nan=True), name
        if blocks.encode is not None:
            runs["encode"] = lambda name=name: encode(name, values)
        speed = {side: values.size / least.processor / 1e6 for side, least in in_turns(runs, arguments.repeats).items()}
        against = (speed["aprjax"] / speed["gguf-py"], speed["aprjax"] / speed["ggml"])
        rows.append((name, speed["aprjax"], speed["gguf-py"], speed["ggml"], *against, speed.get("encode")))
    columns = ("type", "decode M/s", "gguf-py M/s", "ggml M/s", "times gguf-py", "times ggml", "encode M/s")
    results.add(Table(f"Decoding {ROWS} x {COLUMNS}", columns, rows))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
