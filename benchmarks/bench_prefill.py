"""A whole model's prefill: aprjax's arithmetics, llama.cpp, and plain float32 products of its shapes, in one run.

    python benchmarks/bench_prefill.py [--model qwen2.5-coder-1.5b] [--tokens 256] [--repeats 3]

`llama.cpp's arithmetic` and `float32` are presets of aprjax on the same encoded weights. `plain products` are nothing
but `x @ W.T` on decoded float32 matrices, once for every matrix of the model (the head's in eighths, for memory):
what a float32 implementation cannot beat. `llama.cpp` is the installed plain build, every position's logits, nothing
captured. They take turns and the least of the repetitions counts. Wall seconds mean something on an idle machine;
processor seconds also beside other work.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from llama import Llama
from measured import Least, Results, Table, cores, parser

from aprjax.checkpoint.fetch import model_location

# Of an integer-exact prefill: as a share of the plain products' speed (the main job's bar) and of llama.cpp's (issue
# "Fast, and at full size", acceptance 2).
BAR_OF_PLAIN, BAR_OF_LLAMA = 0.5, 0.6
HEAD_PARTS = 8


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


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-1.5b")
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()

    import aprjax
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2

    enable_compilation_cache()
    path = model_location(arguments.model)
    model = Qwen2(aprjax.open(path), PRESETS["llama.cpp"])
    tokens = np.random.default_rng(1).integers(0, 50_000, arguments.tokens).tolist()

    def forward(arithmetic: str) -> Any:
        model.arithmetic = PRESETS[arithmetic]
        return model(tokens)

    runs: dict[str, Callable[[], Any]] = {
        "llama.cpp's arithmetic": lambda: forward("llama.cpp"),
        "float32": lambda: forward("float32"),
        "plain products": plain_products(model, arguments.tokens),
    }
    found = {name: Least() for name in (*runs, "llama.cpp")}
    with Llama(path, arguments.tokens) as peer:
        for counted in (False, *[True] * arguments.repeats):
            for name, run in runs.items():
                (found[name] if counted else Least()).of(run)
            wall, processor = peer.run(tokens).prefill
            if counted:
                engine = found["llama.cpp"]
                engine.wall, engine.processor = min(engine.wall, wall), min(engine.processor, processor)
    about = f"{arguments.model}, {arguments.tokens} tokens, {cores()} cores, the least of {arguments.repeats}."
    results = Results("prefill", about, arguments.out)
    plain, engine = found["plain products"], found["llama.cpp"]
    rows = [
        (
            name,
            least.wall,
            arguments.tokens / least.wall,
            least.processor,
            plain.processor / least.processor,
            engine.wall / least.wall,
            engine.processor / least.processor,
        )
        for name, least in found.items()
    ]
    columns = ("", "wall s", "tokens/s", "processor s", "speed of plain (processor)", "of llama.cpp (wall)")
    results.add(Table("Prefill, nothing captured", (*columns, "of llama.cpp (processor)"), rows))
    ours = found["llama.cpp's arithmetic"]
    results.bar("integer prefill, of plain products", plain.processor / ours.processor, at_least=BAR_OF_PLAIN)
    results.bar("integer prefill, of llama.cpp's (wall)", engine.wall / ours.wall, at_least=BAR_OF_LLAMA)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
