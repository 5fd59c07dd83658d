"""`integer_matmul` by the kernel of `integer_matmul.cc`, which `aprjax.qwen2.native` compiles and registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aprjax.blocks.activations import ActivationBlocks
from aprjax.blocks.relay import Relaid
from aprjax.blocks.roundings import blocks_of_a_run

SOURCE = Path(__file__).with_name("integer_matmul.cc")
# The function's name in the library.
SYMBOL = "aprjax_integer_matmul"
# Formats that the kernel knows. The others are in no published Qwen2 file that was met, and stay XLA's.
FORMATS = frozenset({"Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
# The instruction sets that it is compiled for, as the compilers and as Linux name them.
INSTRUCTIONS = {
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
}


def native_matmul(target: str, weights: Relaid, quantized: ActivationBlocks) -> Any:
    """Integer dots of all rows: float32 `[tokens, rows]`, the bits of `dot.integer_matmul`.

    Args:
        target: the name under which the kernel is registered with XLA.
        weights: re-laid, of one of `FORMATS`.
        quantized: `[tokens, b, …]`. Their sums are not read: the kernel has its own.
    """

    def given(array: Any, dtype: Any) -> Any:
        return jnp.zeros((0,), dtype) if array is None else array

    low, *high = weights.codes
    made = jax.ShapeDtypeStruct((quantized.codes.shape[0], weights.rows), jnp.float32)
    return jax.ffi.ffi_call(target, made)(
        low,
        high[0] if high else given(None, jnp.uint8),
        weights.scale,
        given(weights.group_scales, jnp.int8),
        given(weights.minimum, jnp.float16),
        given(weights.group_minimums, jnp.uint8),
        quantized.codes,
        quantized.scale,
        format=weights.name,
        together=np.int64(blocks_of_a_run(weights.scale.shape[1])),
    )
