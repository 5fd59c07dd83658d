"""Products with encoded weights, against a plain float32 product of the same shape and ggml's `vec_dot`, in one run.

    python benchmarks/bench_dot.py [--repeats 5] [--tokens 1,8,64,256] [--types Q4_K,Q6_K]

`vec_dot` gets the same bytes as rows of 32768 elements, so that calling it from Python costs little, on one thread, for
one token. Ratios are of processor seconds, so that they mean something beside other work, too. `exact` is the product
in the engine's own order of sums. `integer` is what runs use here: the kernel of our own where there is one, else XLA's
program (`xla`).

Alternatives tried before the present form of XLA's program was chosen, two cores of an AMD EPYC (AVX-512 VNNI and
BF16), Q4_K [8960, 1536], as a share of the plain product's speed at 256 / 8 / 1 tokens:

    file layout, decoded inside the scan, scales split in two bfloat16 dots    0.51  0.25  0.10
    file layout, chunks of 1024 rows, batched dot over blocks                  0.54  0.23  0.05
    rows fastest, bit planes, scales split in two bfloat16 dots                0.63  0.48  0.23
    rows fastest, bit planes, float32 dots of 128 (chosen)                     0.71  1.77  0.97

int8 dots run at 1.3 times the float32 rate here, but products of code and scale need two of them; for Q4_0, Q5_0
and Q8_0 one int8 dot was slower than one bfloat16 dot (26 ms against 19 ms at 256 tokens, [4864, 896]). For one token
`aprjax/blocks/one_token.py` replaces the product by sums of int16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ggml import Ggml
from measured import Results, Table, in_turns, parser

SHAPES = {
    "Q4_K": (8960, 1536),
    "Q6_K": (1536, 8960),
    "Q5_K": (8960, 1536),
    "Q3_K": (8960, 1536),
    "Q2_K": (8960, 1536),
    "Q5_0": (4864, 896),
    "Q5_1": (4864, 896),
    "Q4_0": (4864, 896),
    "Q4_1": (4864, 896),
    "Q8_0": (4864, 896),
}
GGML_ROW = 32768
# Issue "Fast, and at full size", acceptance 3: integer dots of so many tokens, as a share of the plain product's speed.
BAR, BAR_TOKENS, BAR_TYPES = 0.6, 256, ("Q4_K", "Q6_K")


def main() -> int:
    import jax
    import jax.numpy as jnp

    from aprjax.blocks import FORMATS
    from aprjax.blocks.dot import float_matmul, integer_matmul
    from aprjax.blocks.exact import exact_matmul
    from aprjax.blocks.relay import relay
    from aprjax.qwen2.native import native_products

    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--tokens", default="1,8,64,256")
    options.add_argument("--types", default=",".join(SHAPES))
    arguments = options.parse_args()
    results = Results(
        "dot", "Matrix products of one matrix; the plain product has decoded float32 weights.", arguments.out
    )
    plain = jax.jit(lambda x, weights: jnp.matmul(x, weights.T, precision="highest"))
    used = partial(integer_matmul, native=native_products().target)
    products = {"integer": used, "xla": integer_matmul, "float": float_matmul, "exact": exact_matmul}
    compiled = {kind: jax.jit(product, static_argnums=0) for kind, product in products.items()}
    rng, ggml, rows = np.random.default_rng(0), Ggml.load(), []
    for name in arguments.types.split(","):
        blocks, shape = FORMATS[name], SHAPES[name]
        packed = rng.integers(0, 60, (shape[0], shape[1] // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
        weights = relay(name, packed)
        decoded = jnp.asarray(blocks.decode(packed).reshape(shape))
        for tokens in map(int, arguments.tokens.split(",")):
            x = rng.normal(size=(tokens, shape[1])).astype(np.float32)
            given = jnp.asarray(x)
            runs: dict[str, Callable[[], Any]] = {"plain": partial(plain, given, decoded)}
            for kind, run in compiled.items():
                runs[kind] = partial(run, name, weights, given)
            if tokens == 1:
                wide = packed.reshape(shape[0] * shape[1] // GGML_ROW, -1)
                runs["ggml"] = ggml.dots(blocks.ggml_id, wide, rng.normal(size=GGML_ROW).astype(np.float32))
            found = in_turns(runs, arguments.repeats)
            least = {kind: clock.processor for kind, clock in found.items()}
            size = shape[0] * shape[1]
            rows.append(
                (
                    f"{name} {shape[0]} x {shape[1]}",
                    tokens,
                    found["plain"].wall * 1e3,
                    found["integer"].wall * 1e3,
                    2e-9 * tokens * size / least["integer"],
                    least["plain"] / least["integer"],
                    least["plain"] / least["xla"],
                    least["plain"] / least["float"],
                    least["exact"] / least["integer"],
                    least["ggml"] / least["integer"] if "ggml" in least else None,
                    weights.nbytes / least["integer"] / 1e9,
                )
            )
            if tokens == BAR_TOKENS and name in BAR_TYPES:
                results.bar(f"{name} of plain", least["plain"] / least["integer"], at_least=BAR)
    columns = ("type, rows x columns", "tokens", "plain wall ms", "integer wall ms", "integer GFLOP/s a core")
    columns += (
        "integer/plain speed",
        "xla/plain speed",
        "float/plain speed",
        "exact/integer time",
        "integer/vec_dot speed",
        "weights GB/s a core",
    )
    results.add(Table("Products", columns, rows))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
