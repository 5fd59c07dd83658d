"""What keeps a run small: the head some positions at a time, weights that are let go in the file once packed."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from aprjax.checkpoint.mapped_file import release_pages
from aprjax.checkpoint.types import EncodedTensor
from aprjax.qwen2.loading import pack
from aprjax.qwen2.modules import PackedWeight

# Positions whose logits are held at once: 128 rows of 151,936 float32 are 78 MB a side.
LOGIT_ROWS = 128

# ggml's tiles take that many rows or more: the head's batches of a longer trace have no fewer.
_LEAST_ROWS = 8


def head_batches(count: int) -> Iterator[slice]:
    """Cuts so many rows into batches for the head, at multiples of four, as kernels take rows together."""
    begin = 0
    while begin < count:
        size = min(LOGIT_ROWS, count - begin)
        if 0 < count - begin - size < _LEAST_ROWS:
            size -= _LEAST_ROWS
        yield slice(begin, begin + size)
        begin += size


def pack_and_release(tensor: EncodedTensor) -> PackedWeight:
    """The matrix for computing; the file's pages behind it no longer count as this process's memory."""
    packed = jax.block_until_ready(pack(tensor))
    release_pages(tensor.data)
    return packed
