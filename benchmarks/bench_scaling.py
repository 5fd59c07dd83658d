"""How time grows: with tokens, layers, width and threads, on synthetic models.

    python benchmarks/bench_scaling.py [--tokens 1,4,16,64,256,1024,2048] [--layers 1,2,4,8] [--widths 256,512,1024]

Models are random Q4_K, shaped as a Qwen2: heads of 64 channels, two key heads, a feed-forward block of four widths.
Every point is a forward pass in the arithmetic `llama.cpp`, compiled before. Threads are counted by processes that may
use so many cores. Exponents are slopes of a line through the logarithms of the last half of the points.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from measured import Least, Results, Table, cores, measure, parser

WIDTH, LAYERS, TOKENS = 512, 2, 64
VOCABULARY = 2048


def model_of(width: int, layers: int) -> Any:
    """Random weights of plausible scale, in memory."""
    import aprjax
    from aprjax.blocks import encode
    from aprjax.checkpoint.types import EncodedTensor, ModelConfig, canonical_tensor_shapes
    from aprjax.qwen2 import preset
    from aprjax.qwen2.model import Qwen2

    base = aprjax.open(aprjax.embedded_model())
    config: ModelConfig = replace(
        base.config,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=4 * width,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    rng, tensors = np.random.default_rng(0), {}
    # One encoded pool for all matrices: encoding is slow, and what the numbers are makes no difference here.
    pool = encode("Q4_K", rng.normal(0, width**-0.5, 1 << 16).astype(np.float32)).reshape(-1, 144)
    for name, shape in canonical_tensor_shapes(config).items():
        if len(shape) == 1:
            data, kind = np.ones(shape, np.float32).view(np.uint8), "F32"
        else:
            blocks = shape[0] * shape[1] // 256
            data, kind = pool[rng.integers(0, len(pool), blocks)].reshape(-1), "Q4_K"
        tensors[name] = EncodedTensor(name=name, shape=shape, block_type=kind, data=data)
    return Qwen2(replace(base, config=config, tensors=tensors), preset("llama.cpp"))


def seconds(model: Any, tokens: int, repeats: int) -> Least:
    """The least of some forward passes."""
    fed, least = np.random.default_rng(1).integers(0, VOCABULARY, tokens).tolist(), Least()
    Least().of(lambda: model(fed))
    for _ in range(repeats):
        least.of(lambda: model(fed))
    return least


def exponent(points: list[tuple[int, float]]) -> float:
    """Of the power law through the last half of the points."""
    last = points[len(points) // 2 - (len(points) < 4) :]
    x, y = np.log([point[0] for point in last]), np.log([point[1] for point in last])
    return float(np.polyfit(x, y, 1)[0])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokens", default="1,4,16,64,256,1024,2048")
    options.add_argument("--layers", default="1,2,4,8")
    options.add_argument("--widths", default="256,512,1024")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--alone", action="store_true", help="one point as JSON: what threads are counted with")
    arguments = options.parse_args()
    if arguments.alone:
        least = seconds(model_of(WIDTH, LAYERS), 256, arguments.repeats)
        print(json.dumps([least.wall, least.processor]))
        return 0
    lists = {name: list(map(int, getattr(arguments, name).split(","))) for name in ("tokens", "layers", "widths")}
    base = model_of(WIDTH, LAYERS)
    curves: dict[str, list[tuple[int, Least]]] = {
        "tokens": [(count, seconds(base, count, arguments.repeats)) for count in lists["tokens"]],
        "layers": [(n, seconds(model_of(WIDTH, n), TOKENS, arguments.repeats)) for n in lists["layers"]],
        "width": [(n, seconds(model_of(n, LAYERS), TOKENS, arguments.repeats)) for n in lists["widths"]],
    }
    curves["threads"] = [(count, on_cores(count, arguments.repeats)) for count in range(1, cores() + 1)]
    about = f"Where not varied: {WIDTH} wide, {LAYERS} layers, {TOKENS} tokens; threads: 256 tokens. {cores()} cores."
    results = Results("scaling", about, arguments.out)
    for name, points in curves.items():
        walls = [(count, least.wall) for count, least in points]
        rows = [(count, least.wall * 1e3, least.processor * 1e3, least.wall * 1e3 / count) for count, least in points]
        note = f"wall seconds ~ {name}^{exponent(walls):.2f}" if len(points) > 1 else ""
        results.add(Table(name, (name, "wall ms", "processor ms", f"wall ms for each of {name}"), rows, note))
    results.plot(drawn(curves))
    return results.finish()


def on_cores(count: int, repeats: int) -> Least:
    """256 tokens in a process that may use so many cores."""
    allowed = sorted(os.sched_getaffinity(0))[:count]
    listed = ",".join(map(str, allowed))
    command = ["taskset", "-c", listed, sys.executable, __file__, "--alone", "--repeats", str(repeats)]
    wall, processor = json.loads(measure(command).said.splitlines()[-1])
    return Least(wall, processor)


def drawn(curves: dict[str, list[tuple[int, Least]]]) -> Any:
    """A panel for each curve, logarithmic on both axes, with a line of proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), constrained_layout=True)
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        x = [count for count, _ in points]
        for label, mark, clock in (("wall", "o-", "wall"), ("processor", "s--", "processor")):
            axes.loglog(x, [getattr(least, clock) * 1e3 for _, least in points], mark, label=label)
        last = points[-1][1].wall * 1e3
        # More threads should take less time; everything else takes more.
        law = [last * (x[-1] / count if name == "threads" else count / x[-1]) for count in x]
        axes.loglog(x, law, ":", color="grey", label="inverse" if name == "threads" else "proportional")
        # The line of proportion ends far below what was measured, where nothing is to be read.
        axes.set_ylim(bottom=min(min(least.wall, least.processor) for _, least in points) * 1e3 / 1.5)
        axes.set_xticks(x, [str(count) for count in x])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_xlabel(name)
        axes.set_ylabel("milliseconds a forward pass")
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
