"""Matrix products with encoded weights against a plain float32 product of the same shape, in one run.

    python benchmarks/bench_dot.py [--repeats 7]

Alternatives tried before the present form was chosen, two cores of an AMD EPYC (AVX-512 VNNI and BF16), Q4_K
[8960, 1536], as a share of the plain product's speed at 256 / 8 / 1 tokens:

    file layout, decoded inside the scan, scales split in two bfloat16 dots    0.51  0.25  0.10
    file layout, chunks of 1024 rows, batched dot over blocks                  0.54  0.23  0.05
    rows fastest, bit planes, scales split in two bfloat16 dots                0.63  0.48  0.23
    rows fastest, bit planes, float32 dots of 128 (chosen)                     0.71  1.77  0.97

int8 dots run at 1.3 times the float32 rate here, but products of code and scale need two of them; for Q4_0, Q5_0
and Q8_0 one int8 dot was slower than one bfloat16 dot (26 ms against 19 ms at 256 tokens, [4864, 896]).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

SHAPES = (
    ("Q4_K", 8960, 1536),
    ("Q6_K", 1536, 8960),
    ("Q5_K", 8960, 1536),
    ("Q5_0", 4864, 896),
    ("Q8_0", 4864, 896),
)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Best of some runs, after one that compiles."""
    import jax

    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    import jax
    import jax.numpy as jnp

    from aprjax.blocks import FORMATS, encode
    from aprjax.blocks.dot import float_matmul, integer_matmul
    from aprjax.blocks.exact import exact_matmul
    from aprjax.blocks.relay import relay

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    plain = jax.jit(lambda x, weights: jnp.matmul(x, weights.T, precision="highest"))
    integer = jax.jit(integer_matmul, static_argnums=0)
    floating = jax.jit(float_matmul, static_argnums=0)
    bitwise = jax.jit(exact_matmul, static_argnums=0)
    rng = np.random.default_rng(0)
    print("type  rows x columns  tokens  plain ms  GFLOP/s  integer/plain speed  float/plain speed  exact ms")
    for name, rows, columns in SHAPES:
        blocks = FORMATS[name]
        packed = rng.integers(0, 60, (rows, columns // blocks.block_size, blocks.block_bytes), dtype=np.uint8)
        if blocks.encode is not None:
            packed = encode(name, rng.normal(size=(rows, columns))).reshape(packed.shape)
        weights = relay(name, packed)
        decoded = jnp.asarray(blocks.decode(packed).reshape(rows, columns))
        for tokens in (1, 8, 64, 256):
            x = jnp.asarray(rng.normal(size=(tokens, columns)).astype(np.float32))
            base = seconds(lambda x=x, decoded=decoded: plain(x, decoded), repeats)
            exact = seconds(lambda x=x, weights=weights, name=name: integer(name, weights, x), repeats)
            wide = seconds(lambda x=x, weights=weights, name=name: floating(name, weights, x), repeats)
            slow = seconds(lambda x=x, weights=weights, name=name: bitwise(name, weights, x), min(repeats, 3))
            rate = 2 * tokens * rows * columns / base / 1e9
            print(
                f"{name}  {rows:5d} x {columns:5d}  {tokens:6d}  {base * 1e3:8.2f}  {rate:7.0f}  "
                f"{base / exact:19.2f}  {base / wide:17.2f}  {slow * 1e3:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
