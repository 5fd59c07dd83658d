"""The noise floor: legitimate re-orderings of a sum stay within the tolerance it gives, faults do not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from aprjax.bisect.lockstep import arbiter
from aprjax.bisect.metrics import relative_l2
from aprjax.bisect.noise.floor import FACTOR, SMALLEST
from aprjax.blocks import block_format, encode
from aprjax.blocks.relay import relay
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.model import precision_scope
from aprjax.qwen2.modules import PackedWeight, multiply

# rows, columns, positions: of attention, gate and down matrices, cut to what a test can afford.
SHAPES = [(256, 256, 8), (128, 2048, 16), (64, 8192, 8)]


def product(blocks: np.ndarray, kind: str, x: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    with precision_scope(arithmetic):
        weight = PackedWeight(relay(kind, blocks), (blocks.shape[0], x.shape[1]))
        return np.asarray(multiply(weight, jnp.asarray(x).astype(arithmetic.dtype), arithmetic))


# Each type and arithmetic at one width, each width at least once: every pair is a compilation or two.
CASES = [
    ("F32", "float32", SHAPES[2]),
    ("Q6_K", "float32", SHAPES[1]),
    ("Q4_K", "llama.cpp", SHAPES[1]),
    ("Q8_0", "llama.cpp", SHAPES[0]),
]


@pytest.mark.parametrize(("kind", "name", "shape"), CASES, ids=str)
def test_other_orders_of_the_same_sum_stay_within_the_tolerance(
    kind: str, name: str, shape: tuple[int, int, int]
) -> None:
    rows, columns, positions = shape
    generator = np.random.default_rng(5)
    size = block_format(kind).block_size
    floors, differences = [], []
    for _ in range(4):
        values = generator.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        x = (generator.normal(size=(positions, columns)) * generator.lognormal(0, 1, columns)).astype(np.float32)
        blocks = encode(kind, values).reshape(rows, columns // size, -1)
        straight = product(blocks, kind, x, PRESETS[name])
        exact = product(blocks, kind, x, arbiter(PRESETS[name]))
        # Whole blocks of 256 change places, so that every quantization stays what it was.
        order = generator.permutation(columns // 256)
        moved = blocks.reshape(rows, columns // 256, -1, blocks.shape[-1])[:, order].reshape(blocks.shape)
        x_moved = x.reshape(positions, columns // 256, 256)[:, order].reshape(x.shape)
        other = product(moved, kind, x_moved, PRESETS[name])
        floors.append(relative_l2(straight, exact) or 0.0)
        differences.append(relative_l2(other, straight) or 0.0)
    tolerance = FACTOR * max(*floors, SMALLEST)
    assert max(differences) <= tolerance
    # The tolerance is worth something: it lies far below the smallest fault worth finding.
    assert tolerance < 1e-5
    # What the comment at FACTOR claims.
    assert max(differences) <= 4 * max(*floors, SMALLEST)


def test_one_flipped_bit_of_one_weight_exceeds_the_tolerance() -> None:
    generator = np.random.default_rng(6)
    values = generator.normal(0, 1 / 16, (256, 256)).astype(np.float32)
    x = generator.normal(size=(8, 256)).astype(np.float32)
    blocks = encode("Q4_K", values).reshape(256, 1, 144)
    straight = product(blocks, "Q4_K", x, PRESETS["llama.cpp"])
    floor = relative_l2(straight, product(blocks, "Q4_K", x, arbiter(PRESETS["llama.cpp"]))) or 0.0
    blocks[100, 0, 50] ^= 8
    flipped = product(blocks, "Q4_K", x, PRESETS["llama.cpp"])
    assert (relative_l2(flipped, straight) or 0.0) > FACTOR * max(floor, SMALLEST)
