"""What a model takes of each device's memory, from its shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from aprjax.blocks import block_format
from aprjax.blocks.relay import chunk_layout, relay_traced
from aprjax.checkpoint.types import ModelConfig, canonical_tensor_shapes
from aprjax.qwen2.sharding import rows_each

# It stays in the file: the host decodes the rows of the tokens at hand.
_ON_THE_HOST = "model.embed_tokens.weight"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each of several devices.

    Attributes:
        weights: its part of every matrix, laid out for computing.
        vectors: norms and biases, which every device has whole.
        cache: keys and values.
    """

    weights: int
    vectors: int
    cache: int

    @property
    def total(self) -> int:
        """All of it; what a layer's activations take comes on top."""
        return self.weights + self.vectors + self.cache

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**asdict(self), "total": self.total}


def device_memory(
    config: ModelConfig,
    block_type: Callable[[str], str],
    *,
    devices: int = 1,
    positions: int = 0,
    dtype: str = "float32",
) -> DeviceMemory:
    """What a loaded model takes of each device.

    Args:
        config: the model's dimensions.
        block_type: a matrix's block type, by its name.
        devices: how many its weights are split over.
        positions: the cache's capacity.
        dtype: of the cache: `Arithmetic.dtype`.
    """
    weights = vectors = 0
    for name, shape in canonical_tensor_shapes(config).items():
        if len(shape) == 1:
            vectors += shape[0] * 4
        elif name != _ON_THE_HOST:
            weights += _matrix_bytes(block_type(name), rows_each(shape[0], devices), shape[1])
    heads = config.num_kv_heads // (devices if config.num_kv_heads % devices == 0 else 1)
    numbers = 2 * config.num_layers * positions * heads * config.head_dim
    return DeviceMemory(weights, vectors, numbers * jnp.dtype(dtype).itemsize)


def _matrix_bytes(name: str, rows: int, columns: int) -> int:
    chunks, chunk_rows = chunk_layout(rows, columns)
    return chunks * chunk_rows * -(-columns // block_format(name).block_size) * _block_bytes(name)


@cache
def _block_bytes(name: str) -> int:
    """Of one block, laid out for computing."""
    packed = jax.ShapeDtypeStruct((1, 1, block_format(name).block_bytes), jnp.uint8)
    relaid = jax.eval_shape(lambda packed: relay_traced(name, packed), packed)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(relaid))
