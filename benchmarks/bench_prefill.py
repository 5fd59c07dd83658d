"""A whole model's prefill: integer arithmetic, float32, and plain float32 products of its shapes, in one run.

    python benchmarks/bench_prefill.py [--model qwen2.5-coder-1.5b] [--tokens 256] [--repeats 3]

`integer` is the arithmetic `llama.cpp`, `decoded` the arithmetic `float32` on the same encoded weights. `plain` is
nothing but `x @ W.T` on decoded float32 matrices, once for every matrix of the model (the head's in eighths, for
memory): what a float32 implementation cannot beat. The three take turns and the least of the repetitions counts.
Wall seconds mean something on an idle machine; processor seconds also beside other work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprjax.checkpoint.fetch import model_location

# Of an integer-exact prefill, as a share of the plain products' speed: the project's bar.
BAR = 0.5
HEAD_PARTS = 8


@dataclass
class Least:
    """The least wall and processor seconds of some runs."""

    wall: float = float("inf")
    processor: float = float("inf")

    def of(self, run: Callable[[], Any]) -> None:
        """Runs once more."""
        import jax

        wall, processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.processor = min(self.processor, time.process_time() - processor)


def plain_products(model: Any, tokens: int) -> Callable[[], Any]:
    """Runs `x @ W.T` in float32 as often as the model does, on random numbers."""
    import jax
    import jax.numpy as jnp

    shapes: Counter[tuple[int, int]] = Counter()
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        shapes.update(linear.weight.shape for linear in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    rows, columns = model.head.shape
    shapes[rows // HEAD_PARTS, columns] += HEAD_PARTS
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    operands = {shape: (numbers(tokens, shape[1]), numbers(*shape)) for shape in shapes}
    product = jax.jit(lambda x, weight: jnp.matmul(x, weight.T, precision="highest"))
    return lambda: [product(*operands[shape]) for shape, count in shapes.items() for _ in range(count)]


def main() -> None:
    """Prints seconds and shares, and exits with 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import aprjax
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2

    enable_compilation_cache()
    model = Qwen2(aprjax.open(model_location(options.model)), PRESETS["llama.cpp"])
    tokens = np.random.default_rng(1).integers(0, 50_000, options.tokens).tolist()

    def forward(arithmetic: str) -> Any:
        model.arithmetic = PRESETS[arithmetic]
        return model(tokens)

    runs: dict[str, Callable[[], Any]] = {
        "integer": lambda: forward("llama.cpp"),
        "decoded": lambda: forward("float32"),
        "plain": plain_products(model, options.tokens),
    }
    seconds = {name: Least() for name in runs}
    for run in runs.values():  # compiles
        Least().of(run)
    for _ in range(options.repeats):
        for name, run in runs.items():
            seconds[name].of(run)
    print(f"{options.model}, {options.tokens} tokens, {os.cpu_count()} cores, least of {options.repeats}")
    print("           wall s   tokens/s   of plain   processor s   of plain")
    for name, least in seconds.items():
        wall, processor = seconds["plain"].wall / least.wall, seconds["plain"].processor / least.processor
        print(
            f"{name:8} {least.wall:8.2f} {options.tokens / least.wall:10.1f} {wall:10.2f} "
            f"{least.processor:13.2f} {processor:10.2f}"
        )
    share = seconds["plain"].wall / seconds["integer"].wall
    raise SystemExit(0 if share >= BAR else f"below {BAR:.0%} of the plain products' speed: {share:.0%}")


if __name__ == "__main__":
    main()
