"""Whether a compiled kernel of integer products has the bits of XLA's program.

`python -m aprjax.qwen2.native_check LIBRARY`. In a process of its own, because a processor or a machine that hides an
instruction kills what uses it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from aprjax.blocks import block_format
from aprjax.blocks.dot import integer_matmul
from aprjax.blocks.native.product import FORMATS
from aprjax.blocks.relay import relay
from aprjax.qwen2.native import register

# More than a tile of 64 rows and no multiple of it; tokens for the kernel of four and that of one; two blocks of 256.
_ROWS, _TOKENS, _COLUMNS = 70, 5, 512


def differing_formats(target: str) -> list[str]:
    """The formats of which any bit differs between the kernel registered as `target` and XLA's program."""
    random = np.random.default_rng(2026)
    weights = {name: relay(name, _blocks(name, random)) for name in sorted(FORMATS)}
    x = random.standard_normal((_TOKENS, _COLUMNS), dtype=np.float32)

    @jax.jit
    def both(weights: dict, x: jax.Array) -> dict:
        return {
            name: (integer_matmul(name, weight, x), integer_matmul(name, weight, x, native=target))
            for name, weight in weights.items()
        }

    found = jax.device_get(both(weights, x))
    return [name for name, (one, other) in found.items() if _bits(one) != _bits(other)]


def _blocks(name: str, random: np.random.Generator) -> np.ndarray:
    """Random bytes: every code and scale occurs, and in places a scale that is no number."""
    blocks = block_format(name)
    return random.integers(0, 256, (_ROWS, _COLUMNS // blocks.block_size, blocks.block_bytes), dtype=np.uint8)


def _bits(values: np.ndarray) -> bytes:
    # Which of several NaN a processor makes of two is not laid down.
    return np.where(np.isnan(values), np.float32(np.nan), values).tobytes()


def main(library: str) -> int:
    """The exit code: 0 if all bits are equal."""
    register(Path(library), "checked")
    different = differing_formats("checked")
    if different:
        print(f"other bits than XLA's program: {', '.join(different)}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
