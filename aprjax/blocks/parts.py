"""Products of some rows of a matrix with the bits that they have among all of them.

XLA's CPU backend multiplies several tokens by a kernel that cuts a row's sum where a block of weights outgrows a cache.
Where it cuts hangs on the *number of rows*, and on the place among them: at 16 tokens 448 rows of 896 have other bits
alone, and others again in another place. So a device that holds some rows lays them at their own place in a matrix of
the whole one's shape, zeros around them. That costs a device the multiplications of the whole chunk; its memory, its
decoding and its attention stay its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aprjax.blocks.relay import chunk_layout


@partial(jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["rows", "columns", "devices"])
@dataclass(frozen=True)
class Part:
    """Which rows of a matrix a device has: as many as every other, zeros behind the last.

    Attributes:
        index: of the device, int32 scalar, traced.
        rows: of the whole matrix.
        columns: of the whole matrix.
        devices: that share it.
    """

    index: Any
    rows: int
    columns: int
    devices: int

    @property
    def each(self) -> int:
        """Rows of a device."""
        return -(-self.rows // self.devices)

    def chunks_met(self, rows: int) -> int:
        """How many of the whole matrix's chunks a device's chunk of `rows` can have a row of, at most."""
        width = chunk_layout(self.rows, self.columns)[1]
        starts = (device * self.each + start for device in range(self.devices) for start in range(0, self.each, rows))
        return max((start % width + rows - 1) // width + 1 for start in starts)


def dot_in_place(left: Any, right: Any, part: Part, start: Any, dot: Callable[[Any, Any], Any]) -> Any:
    """`dot(left, right)`, in the shape and at the place that the whole matrix's chunks have.

    Args:
        left: `[tokens, k]`.
        right: `[k, rows]`, a chunk of the part's rows.
        part: which rows the device has.
        start: of the chunk among them, traced or not; a multiple of its rows.
        dot: `[tokens, k], [k, rows]` -> `[tokens, rows]`.

    Returns:
        `[tokens, rows]`.
    """
    rows = right.shape[1]
    width = chunk_layout(part.rows, part.columns)[1]
    first = -((part.index * part.each + start) % width)
    right = jnp.pad(right, ((0, 0), (width, width)))
    out = jnp.zeros((left.shape[0], right.shape[1]), left.dtype)
    for chunk in range(part.chunks_met(rows)):
        # Beyond the last row that is there, a slice would be moved to what is: such a chunk is one of zeros.
        at = jnp.minimum(first + (chunk + 1) * width, rows + width)
        product = dot(left, lax.dynamic_slice_in_dim(right, at, width, axis=1))
        out = lax.dynamic_update_slice_in_dim(out, product, at, axis=1)
    return out[:, width : width + rows]
