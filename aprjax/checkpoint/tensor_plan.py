"""A tensor on its way into another file: which block type it is to have, and its bytes in small pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprjax.blocks import block_format, byte_size, encode
from aprjax.checkpoint.types import CheckpointError, EncodedTensor

# Elements decoded at a time (16 MiB as float32): small beside any tensor that would need chunks,
# large enough that NumPy's calls do not count.
_CHUNK_ELEMENTS = 1 << 22
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output file.

    Attributes:
        name: its name in the output.
        source: where its values come from.
        block_type: how the output holds them. Where it is the source's own the bytes are copied;
            otherwise the values are decoded to float32 and encoded again.
    """

    name: str
    source: EncodedTensor
    block_type: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape, the source's."""
        return self.source.shape

    @property
    def copied(self) -> bool:
        """Whether the output holds the source's very bytes."""
        return self.block_type == self.source.block_type and not self.source.row_padded

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return byte_size(self.block_type, self.shape)

    def chunks(self) -> Iterator[np.ndarray]:
        """The output's bytes in order, `uint8[…]` pieces of some MiB each.

        Raises:
            CheckpointError: a finite value does not fit the narrower type.
        """
        if self.copied:
            for start in range(0, self.source.nbytes, _CHUNK_BYTES):
                yield self.source.data[start : start + _CHUNK_BYTES]
            return
        for values in self._values():
            encoded = encode(self.block_type, values)
            if self.block_type == "F16" and bool(
                np.any(np.isinf(encoded.view(np.float16)) & np.isfinite(values.reshape(-1)))
            ):
                raise CheckpointError(
                    f"values up to {np.abs(values).max():g} do not fit {self.block_type}",
                    file=self.source.file,
                    tensor=self.source.name,
                    fix="write float32 or bfloat16 instead",
                )
            yield encoded

    @property
    def data(self) -> np.ndarray:
        """All of the output's bytes, `uint8[bytes]`; made anew at every access unless they are the source's."""
        return self.source.data if self.copied else np.concatenate(list(self.chunks()))

    def _values(self) -> Iterator[np.ndarray]:
        """Decoded values, some rows at a time where rows begin at block boundaries."""
        source = self.source
        width = math.prod(source.shape[1:])
        blocks = block_format(source.block_type)
        whole_rows = not blocks.tensor_scale and (source.row_padded or width % blocks.block_size == 0)
        if len(source.shape) < 2 or source.size <= _CHUNK_ELEMENTS or not whole_rows:
            yield source.decode()
            return
        rows = max(1, _CHUNK_ELEMENTS // width)
        for start in range(0, source.shape[0], rows):
            yield source.decode_rows(slice(start, start + rows))
