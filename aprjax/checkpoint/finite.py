"""NaN and infinite weights, found without decoding.

The integers in a block are finite, so a block of a quantized type decodes to something that is not
finite exactly when one of its float16 scales is not: looking at those reads the file once and
computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aprjax.blocks import block_format
from aprjax.checkpoint.types import EncodedTensor, Finding

# Byte offsets of the float16 scales in a block (ggml-common.h).
_SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "AprQ4": (0,),
}
# The bits of a float's exponent; all set means infinite or NaN.
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
# Blocks looked at in one go (some MiB of a file).
_CHUNK_BLOCKS = 1 << 15


def nonfinite_blocks(tensor: EncodedTensor) -> tuple[int, int | None]:
    """How many blocks (elements, for float types) of a tensor decode to NaN or an infinity, and where the first is.

    Returns:
        The count, and the absolute file offset of the first such block, or None. Types that are
        neither float nor scaled by float16 (integers, IQ*, …) count as finite.
    """
    name = tensor.block_type
    if name not in _EXPONENTS and name not in _SCALE_OFFSETS:
        return 0, None
    size = block_format(name).block_bytes
    count, first = 0, None
    step = _CHUNK_BLOCKS * (256 if name in _EXPONENTS else 1) * size
    for start in range(0, tensor.nbytes, step):
        bad = _nonfinite(name, tensor.data[start : start + step].reshape(-1, size))
        found = int(np.count_nonzero(bad))
        if found and first is None:
            first = tensor.offset + start + int(np.argmax(bad)) * size
        count += found
    return count, first


def finite_findings(tensors: Iterable[EncodedTensor]) -> list[Finding]:
    """Finding `values-not-finite` (error) for each tensor with NaN or infinite values. Reads the whole file."""
    findings = []
    for tensor in tensors:
        count, first = nonfinite_blocks(tensor)
        if count:
            unit = "values" if tensor.block_type in _EXPONENTS else f"{tensor.block_type} blocks"
            message = f"{count} {unit} are NaN or infinite"
            findings.append(
                Finding(
                    "values-not-finite",
                    "error",
                    message,
                    tensor=tensor.name,
                    offset=first,
                    reference="F-DATA-QUALITY-002",
                )
            )
    return findings


def _nonfinite(name: str, blocks: np.ndarray) -> np.ndarray:
    """Which blocks are not finite: `uint8[blocks, block_bytes] -> bool[blocks]`."""
    if name in _EXPONENTS:
        dtype, exponent = _EXPONENTS[name]
        return (blocks.reshape(-1).view(dtype) & exponent) == exponent
    bad = np.zeros(len(blocks), dtype=bool)
    for offset in _SCALE_OFFSETS[name]:
        # The exponent of a little-endian float16 lies in its second byte.
        bad |= (blocks[:, offset + 1] & 0x7C) == 0x7C
    return bad
