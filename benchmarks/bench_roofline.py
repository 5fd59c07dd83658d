"""Where the kernels stand between memory bandwidth and peak arithmetic, both measured on this machine.

    python benchmarks/bench_roofline.py [--repeats 5]

Bandwidth: the sum over an array that fits no cache (NumPy, a thread for each core). Peak: a large float32 matrix
product under XLA. A kernel's intensity is its operations (two for each weight and token) for each byte that it must
move: the packed weights once, activations and results. Its bound is the lesser of peak and intensity times bandwidth.
The peak of 8-bit products, which the kernel of our own uses, is not measured: an instruction has four times the
operations of a float32 one (VPDPBUSD: 64 multiplications and additions of 512 bits, VFMADD: 16), so four times the
float32 peak is drawn, which nothing reaches that has scales to multiply as well.
Shares of a bound beyond 1 are possible where weights stay in a cache between repetitions, which many tokens' do.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from measured import Least, Results, Table, cores, in_turns, parser

# Operations of an 8-bit instruction for each of a float32 one.
_EIGHT_BIT = 4
# Feed-forward and head matrices of the 1.5B and 0.5B; the head's in a quarter, which still fits no cache.
SHAPES = (("Q4_K", 8960, 1536), ("Q6_K", 1536, 8960), ("Q5_0", 4864, 896), ("Q8_0", 151936 // 4, 896))
TOKENS = (1, 8, 64, 256)


def bandwidth(repeats: int) -> float:
    """GB a second that all cores read together."""
    parts, least = [np.ones(1 << 25, np.int64) for _ in range(cores())], Least()
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeats + 1):
            least.of(lambda: list(pool.map(np.sum, parts)))
    return sum(part.nbytes for part in parts) / least.wall / 1e9


def peak(repeats: int) -> float:
    """GFLOP a second of a float32 product of 2048 x 2048 matrices."""
    import jax
    import jax.numpy as jnp

    size = 2048
    left = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return 2e-9 * size**3 / in_turns({"": lambda: product(left)}, repeats)[""].wall


def main() -> int:
    import jax
    import jax.numpy as jnp

    from aprjax.blocks import FORMATS
    from aprjax.blocks.dot import integer_matmul
    from aprjax.blocks.relay import relay
    from aprjax.qwen2.native import native_products

    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    speed, most = bandwidth(arguments.repeats), peak(arguments.repeats)
    about = f"{cores()} cores: {speed:.1f} GB/s of memory, {most:.0f} GFLOP/s of float32 products."
    target = native_products().target
    if target is not None:
        most *= _EIGHT_BIT
    results = Results("roofline", about, arguments.out)
    product = jax.jit(partial(integer_matmul, native=target), static_argnums=0)
    rng, rows = np.random.default_rng(0), []
    for name, out, columns in SHAPES:
        blocks = FORMATS[name]
        shape = (out, columns // blocks.block_size, blocks.block_bytes)
        weights = relay(name, rng.integers(0, 60, shape, dtype=np.uint8))
        for tokens in TOKENS:
            x = jnp.asarray(rng.standard_normal((tokens, columns), np.float32))
            wall = in_turns({"": partial(product, name, weights, x)}, arguments.repeats)[""].wall
            operations = 2 * tokens * out * columns
            intensity = operations / (weights.nbytes + 4 * tokens * (out + columns))
            bound = min(most, intensity * speed)
            reached = operations / wall / 1e9
            limit = "memory" if bound < most else "arithmetic"
            kernel = f"{name} {out} x {columns}"
            rows.append(
                (kernel, tokens, intensity, reached, bound, reached / bound, limit, weights.nbytes / wall / 1e9)
            )
    names = ("kernel", "tokens", "FLOP a byte", "GFLOP/s", "bound GFLOP/s", "of bound", "bound by", "weights GB/s")
    results.add(Table("Integer-exact products on the roofline", names, rows))
    results.plot(drawn(rows, speed, most))
    return results.finish()


def drawn(rows: list[tuple[Any, ...]], speed: float, most: float) -> Any:
    """The roof and a line for each kernel, from one token to many."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    x = np.geomspace(min(row[2] for row in rows) / 1.5, max(row[2] for row in rows) * 1.5, 100)
    roof = f"{speed:.0f} GB/s, {most:.0f} operations a nanosecond"
    axes.loglog(x, np.minimum(most, x * speed), color="black", label=roof)
    for kernel in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == kernel]
        axes.loglog([row[2] for row in mine], [row[3] for row in mine], "o-", label=kernel)
        for row in mine:
            axes.annotate(str(row[1]), (row[2], row[3]), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes.set_xlabel("operations for each byte of weights, activations and results")
    axes.set_ylabel("GFLOP/s (tokens beside the points)")
    axes.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    sys.exit(main())
