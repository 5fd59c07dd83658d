"""What llama.cpp's default build computes instead of `vec_dot`, in NumPy: the specification of exact_default.py.

ggml tries other kernels before `vec_dot` (`ggml_compute_forward_mul_mat`, ggml-cpu.c), in this order:

- **repack** (`GGML_CPU_REPACK`, repack.cpp and arch/x86/repack.cpp): Q4_0 and Q4_K weights are interleaved by eight
  rows when they are loaded. Every output has one running sum, and its minimums another. Activation rows go through the
  kernel in fours; of a batch's last one to three, and of a batch of fewer than four, each goes through another kernel
  alone.
- **tiled** (tiled/tiled-kernel.cpp): K-quants, from eight activation rows on; `GGML_CPU_TILED_MM=0` turns it off.
- **tinyBLAS** (`GGML_LLAMAFILE`, llamafile/sgemm.cpp): from two activation rows on. Its integer kernels give the bits
  of `vec_dot`; its float kernels have one register of running sums where `vec_dot` has four.

Integers are the same everywhere; the order of float operations is what differs, and so a row's result depends on its
place in the batch. The compilers' vectors (AVX2, AVX-512, VNNI) make no difference but in the float dots.
"""

from __future__ import annotations

import numpy as np

from aprjax.blocks.activations import ActivationBlocks, quantize_q8_0, quantize_q8_k, quantize_q8_k_by_fours
from aprjax.blocks.fields import Fields
from aprjax.blocks.float_twins import fused_multiply_add
from aprjax.blocks.registry import block_format
from aprjax.blocks.twins import BlockPair, block_pairs, neighbours

_NOTHING = np.float32(0)
TILED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# On x86 with AVX2. AVX-512 adds Q2_K; IQ4_NL and MXFP4 are not computed here.
REPACKED = ("Q4_0", "Q4_K")


def _fields(name: str, packed: np.ndarray, known: tuple[str, ...]) -> Fields:
    blocks = block_format(name)
    if name not in known or blocks.unpack is None:
        raise ValueError(f"{name} has no such kernel; there are those of {', '.join(known)}")
    return blocks.unpack(packed)


def _minimum_products(pair: BlockPair) -> np.ndarray:
    """Minimums times the activations' sums, group by group: int64 `[…, groups]`."""
    assert pair.weights.group_minimums is not None
    assert pair.activation_sums is not None
    sums = pair.activation_sums
    if pair.weights.group_minimums.shape[-1] == 8:
        sums = neighbours(sums)  # groups of 32, sums of 16
    return pair.weights.group_minimums * sums


def tiled_dot(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`tiled_run_microtile`: a block's integers as one number, decoded by the weight's scales, then the activation's.

    Args:
        name: a K-quant.
        packed: `uint8[…, blocks, block_bytes]`.
        x: float32 `[…, width]`; its leading axes broadcast with those of `packed`.

    Returns:
        float32 `[…]`.

    Raises:
        ValueError: the type is no K-quant.
    """
    total = _NOTHING
    with np.errstate(over="ignore", invalid="ignore"):
        for pair in block_pairs(_fields(name, packed, TILED), quantize_q8_k(x)):
            block = pair.weights.scale * pair.products.sum(axis=-1).astype(np.float32)
            if pair.weights.minimum is not None:
                lows = _minimum_products(pair).sum(axis=-1).astype(np.float32)
                block = fused_multiply_add(-pair.weights.minimum, lows, block)
            total = fused_multiply_add(block, pair.activation_scale, total)
    return np.asarray(total)


def repacked_dot(name: str, packed: np.ndarray, x: np.ndarray, *, fours: bool) -> np.ndarray:
    """`ggml_gemv_q4_K_8x8_q8_K`, or with `fours` `ggml_gemm_q4_K_8x8_q8_K`, which adds two groups of 32 at a time.

    Of Q4_0 both functions take the same steps.

    Args:
        name: Q4_0 or Q4_K.
        packed: `uint8[…, blocks, block_bytes]`, in the file's order.
        x: float32 `[…, width]`; its leading axes broadcast with those of `packed`.
        fours: whether the activation row is one of four that are multiplied together.

    Returns:
        float32 `[…]`.

    Raises:
        ValueError: the type is not repacked.
    """
    fields = _fields(name, packed, REPACKED)
    if name == "Q4_0":
        return _one_sum(fields, quantize_q8_0(x))
    total, total_lows = _NOTHING, _NOTHING
    with np.errstate(over="ignore", invalid="ignore"):
        for pair in block_pairs(fields, quantize_q8_k_by_fours(x) if fours else quantize_q8_k(x)):
            assert pair.weights.minimum is not None
            steps = 4 if fours else 1
            products = pair.products.reshape(*pair.products.shape[:-1], steps, -1).sum(axis=-1)
            lows = _minimum_products(pair)
            lows = lows.reshape(*lows.shape[:-1], steps, -1).sum(axis=-1)
            low_scale = pair.weights.minimum * pair.activation_scale
            for step in range(steps):
                total = fused_multiply_add(products[..., step].astype(np.float32), pair.scale, total)
                total_lows = fused_multiply_add(lows[..., step].astype(np.float32), low_scale, total_lows)
        return np.asarray(total - total_lows)


def _one_sum(fields: Fields, activations: ActivationBlocks) -> np.ndarray:
    total = _NOTHING
    with np.errstate(over="ignore", invalid="ignore"):
        for pair in block_pairs(fields, activations):
            total = fused_multiply_add(pair.products.sum(axis=-1).astype(np.float32), pair.scale, total)
    return np.asarray(total)


def repacked_matmul(name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A whole product as `forward_mul_mat` cuts it: `x[tokens, width]` by rows `packed` -> float32 `[tokens, rows]`."""
    together = len(x) - len(x) % 4
    parts = ((x[:together, None], True), (x[together:, None], False))
    return np.concatenate([repacked_dot(name, packed, part, fours=fours) for part, fours in parts if len(part)])


def one_register_dot(left: np.ndarray, right: np.ndarray, *, lanes: int = 8) -> np.ndarray:
    """TinyBLAS' float dot: one register of running sums, `hsum` at the end. float32 `[…, n]` twice -> `[…]`.

    Args:
        left: float32, or float16 values as float32.
        right: likewise, broadcasting.
        lanes: 8 as AVX2 has it, 16 as AVX-512; n is a multiple.
    """
    sums = _NOTHING
    for start in range(0, left.shape[-1], lanes):
        part = slice(start, start + lanes)
        sums = fused_multiply_add(left[..., part], right[..., part], sums)
    return add_halves(np.asarray(sums))


def wide_dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`ggml_vec_dot_f32` and `…_f16` with AVX-512: four registers of sixteen lanes; n is a multiple of 64."""
    sums = _NOTHING
    for start in range(0, left.shape[-1], 64):
        part = slice(start, start + 64)
        sums = fused_multiply_add(left[..., part], right[..., part], sums)
    registers = np.asarray(sums).reshape(*np.shape(sums)[:-1], 4, 16)
    pairs = registers[..., 0:2, :] + registers[..., 2:4, :]
    return add_halves(pairs[..., 0, :] + pairs[..., 1, :])


def add_halves(lanes: np.ndarray) -> np.ndarray:
    """The upper half added to the lower one until one number is left: `[…, 2^n]` -> `[…]`."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., half:] + lanes[..., :half]
    return lanes[..., 0]
