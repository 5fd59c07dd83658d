"""IQ*, TQ*, MXFP4, NVFP4: decoded by the `gguf` package (`gguf.quants`), slowly but faithfully.

Qwen2 files of this kind are rare; their codebooks are not worth a second copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def decoder(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A NumPy decoder that hands whole blocks to gguf-py."""

    def decode(blocks: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        values = quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[name])
        return values.reshape(len(blocks), -1).astype(np.float32, copy=False)

    return decode
