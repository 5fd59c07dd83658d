"""Encoded tensors: rows are decoded alone only where they begin with a block."""

from __future__ import annotations

import numpy as np
import pytest

from aprjax.blocks import byte_size, encode
from aprjax.checkpoint.types import CheckpointError, EncodedTensor


@pytest.mark.parametrize(("kind", "shape"), [("AprQ8", (4, 10)), ("AprQ4", (4, 10)), ("Q4_K", (2, 500))])
def test_rows_that_share_blocks_are_not_split(kind: str, shape: tuple[int, int]) -> None:
    tensor = EncodedTensor("t", shape, kind, np.zeros(byte_size(kind, shape), np.uint8))
    with pytest.raises(CheckpointError, match="no whole blocks per row"):
        tensor.packed()


@pytest.mark.parametrize(("kind", "width"), [("F32", 7), ("Q8_0", 64), ("Q4_K", 512)])
def test_rows_decode_to_what_the_whole_decodes_to(kind: str, width: int) -> None:
    values = np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)
    tensor = EncodedTensor("t", values.shape, kind, encode(kind, values))
    rows = np.array([3, 8, 0])
    assert np.array_equal(tensor.decode_rows(rows), tensor.decode()[rows])
    assert np.array_equal(tensor.decode_rows(slice(2, 5)), tensor.decode()[2:5])


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Q4_K of shape \[2, 256\] takes 288 bytes, found 287"):
        EncodedTensor("t", (2, 256), "Q4_K", np.zeros(287, np.uint8))
