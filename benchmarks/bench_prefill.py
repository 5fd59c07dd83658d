"""A whole model's prefill, alone and with every stage captured: aprjax, llama.cpp, and plain float32 products.

    python benchmarks/bench_prefill.py [--model qwen2.5-coder-1.5b] [--tokens 256] [--repeats 3]

Every engine has the model loaded; they take turns, and the least of the repetitions counts. All compute the logits of
every position. `llama.cpp` is the installed plain build, whose arithmetic the preset `llama.cpp` follows; beside it
stands the build that `pip install` gives (repacked weights, tiles), where `make peers` has made it. `plain products`
are nothing but `x @ W.T` on decoded float32 matrices, once for every matrix of the model (the head's in eighths, for
memory): what a float32 implementation cannot beat.

Captured: aprjax's stages as NumPy arrays, those that llama.cpp has and one more (it fuses SiLU with the product). Of
llama.cpp every node that they are made from, copied by its evaluation callback as it stands, into memory that earlier
runs have touched; nothing is rearranged (`llama_child.py`). Wall seconds mean something on an idle machine; processor
seconds also beside other work.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from llama import Llama
from measured import Least, Results, Table, cores, parser

from aprjax.checkpoint.fetch import model_location
from aprjax.trace.llama_builds import installed_builds

# Of an integer-exact prefill: as a share of the plain products' speed (the main job's bar) and of llama.cpp's (issue
# "Fast, and at full size", acceptance 2).
BAR_OF_PLAIN, BAR_OF_LLAMA = 0.5, 0.6
# The same acceptance: every stage captured, times as fast as llama.cpp capturing the same nodes.
BAR_CAPTURED = 1.5
HEAD_PARTS = 8
OURS, PEER, DEFAULT = "llama.cpp's arithmetic", "llama.cpp", "llama.cpp's default build"


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

    def captured() -> Any:
        model.arithmetic = PRESETS["llama.cpp"]
        return {key: np.asarray(value) for key, value in model.run_with_cache(tokens)[1].items()}

    runs: dict[str, Callable[[], Any]] = {
        OURS: lambda: forward("llama.cpp"),
        "float32": lambda: forward("float32"),
        "plain products": plain_products(model, arguments.tokens),
    }
    builds = {PEER: None, **({DEFAULT: found} if (found := installed_builds().get("default")) else {})}
    alone = {name: Least() for name in (*runs, *builds)}
    traced = {name: Least() for name in (OURS, *builds)}
    sizes: dict[str, int] = {}
    with ExitStack() as opened:
        engines = {
            (name, capture): opened.enter_context(Llama(path, arguments.tokens, library=library, capture=capture))
            for name, library in builds.items()
            for capture in (False, True)
        }
        for counted in (False, *[True] * arguments.repeats):
            for name, run in runs.items():
                (alone[name] if counted else Least()).of(run)
            values = (traced[OURS] if counted else Least()).of(captured)
            sizes[OURS] = sum(value.nbytes for value in values.values())
            del values
            for (name, capture), engine in engines.items():
                answer = engine.run(tokens)
                if counted:
                    (traced if capture else alone)[name].seen(*answer.prefill)
                if capture:
                    sizes[name] = answer.captured
    about = f"{arguments.model}, {arguments.tokens} tokens, {cores()} cores, the least of {arguments.repeats}."
    results = Results("prefill", about, arguments.out)
    plain, engine, ours = alone["plain products"], alone[PEER], alone[OURS]
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
        for name, least in alone.items()
    ]
    columns = ("", "wall s", "tokens/s", "processor s", "speed of plain (processor)", "of llama.cpp (wall)")
    results.add(Table("Prefill, nothing captured", (*columns, "of llama.cpp (processor)"), rows))
    results.bar("integer prefill, of plain products", plain.processor / ours.processor, at_least=BAR_OF_PLAIN)
    results.bar("integer prefill, of llama.cpp's (wall)", engine.wall / ours.wall, at_least=BAR_OF_LLAMA)
    capturing = traced[PEER]
    rows = [
        (
            name,
            least.wall,
            least.processor,
            least.wall - alone[name].wall,
            sizes[name] / 1e9,
            capturing.wall / least.wall,
            capturing.processor / least.processor,
        )
        for name, least in traced.items()
    ]
    columns = ("", "wall s", "processor s", "beyond no capture, wall s", "captured GB", "speed of llama.cpp (wall)")
    results.add(Table("Prefill, every stage captured in memory", (*columns, "(processor)"), rows))
    ratio = capturing.wall / traced[OURS].wall
    results.bar("captured prefill, times as fast as llama.cpp capturing (wall)", ratio, at_least=BAR_CAPTURED)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
