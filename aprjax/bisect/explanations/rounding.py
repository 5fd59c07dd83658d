"""How much of a difference the rounding of a block type explains, measured on the tensor's own blocks."""

from __future__ import annotations

import numpy as np

from aprjax.blocks import block_format
from aprjax.checkpoint.types import EncodedTensor

# Half a unit in the last place of each plain type, relative: the mantissas have 24, 11 and 8 bits. F32 has room for
# the two roundings of a product and a sum.
_PLAIN = {"F32": 2.0**-22, "F16": 2.0**-11, "BF16": 2.0**-8, "F64": 2.0**-22}
# Types without integer fields at hand: their bits per element give the number of levels (aprjax.blocks.exotic).
_LEVELS_PER_RMS = 3.0
_BLOCKS = 4096


def rounding_of(values: np.ndarray, tensor: EncodedTensor) -> float:
    """Relative rms error of rounding such values to such a tensor's steps.

    A uniform rounding error has the variance step^2 / 12. The step of every group is read from the blocks.

    Args:
        values: float32, some of the decoded values.
        tensor: whose blocks say how coarse it is.
    """
    blocks = block_format(tensor.block_type)
    if not blocks.quantized:
        return _PLAIN.get(tensor.block_type, 0.0)
    rms = float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0
    if not np.isfinite(rms) or rms == 0.0:
        return 0.0
    body = tensor.data[blocks.header_bytes :]
    if blocks.tensor_scale:
        return abs(float(tensor.data[:4].view("<f4")[0])) / np.sqrt(12.0) / rms
    if blocks.unpack is None:
        return _LEVELS_PER_RMS * 2.0 ** (-8.0 * blocks.block_bytes / blocks.block_size) / np.sqrt(12.0)
    packed = body.reshape(-1, blocks.block_bytes)
    fields = blocks.unpack(np.ascontiguousarray(packed[:: max(1, len(packed) // _BLOCKS)]))
    steps = fields.scale[..., None].astype(np.float64)
    if fields.group_scales is not None:
        steps = steps * fields.group_scales
    step = float(np.sqrt(np.square(steps).mean()))
    return step / np.sqrt(12.0) / rms if np.isfinite(step) else 0.0
