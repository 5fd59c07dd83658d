"""What several tests of the block formats share: random blocks, and ggml's own routines through ctypes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.blocks import FORMATS, block_format, encode

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where a block keeps its float16 scales: [first byte, end).
SCALE_BYTES = {
    "Q4_1": (0, 4),
    "Q5_1": (0, 4),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
}


def random_blocks(name: str, leading: tuple[int, ...], rng: np.random.Generator, *, finite: bool = True) -> np.ndarray:
    """`uint8[*leading, block_bytes]` of random bytes; with `finite`, the scales are drawn from 0.001 … 0.02."""
    blocks = rng.integers(0, 256, (*leading, FORMATS[name].block_bytes), dtype=np.uint8)
    if finite:
        first, end = SCALE_BYTES.get(name, (0, 2))
        scales = rng.uniform(0.001, 0.02, (*leading, (end - first) // 2)).astype("<f2")
        blocks[..., first:end] = scales.view(np.uint8)
    return blocks


def bits(values: object) -> np.ndarray:
    """float32 as its bits, every NaN made the same one (payloads are unspecified)."""
    array = np.asarray(values, np.float32)
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def ggml_dequantize(library: ctypes.CDLL, name: str, blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_*` of libggml-base: float32 `[blocks, block_size]`."""
    blocks = np.ascontiguousarray(blocks)
    out = np.empty((len(blocks), FORMATS[name].block_size), np.float32)
    library[f"dequantize_row_{ggml_spelling(name)}"](_pointer(blocks), _pointer(out), ctypes.c_int64(out.size))
    return out


def ggml_quantize(library: ctypes.CDLL, name: str, values: np.ndarray, *, suffix: str) -> np.ndarray:
    """`quantize_row_*{suffix}`: `uint8[blocks, block_bytes]`."""
    values = np.ascontiguousarray(values, np.float32)
    blocks = block_format(name)
    out = np.zeros((values.size // blocks.block_size, blocks.block_bytes), np.uint8)
    routine = library[f"quantize_row_{ggml_spelling(name)}{suffix}"]
    routine(_pointer(values), _pointer(out), ctypes.c_int64(values.size))
    return out


def ggml_spelling(name: str) -> str:
    """`Q4_K` -> `q4_K`, as ggml's symbols have it."""
    return name[0].lower() + name[1:]


class _CpuTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` (ggml-cpu.h)."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("rows_at_a_time", ctypes.c_int64),
    )


_FROM_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_SIZE, _POINTER, _INT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_VEC_DOT = ctypes.CFUNCTYPE(None, _INT, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT)


def ggml_traits(library: ctypes.CDLL, name: str) -> _CpuTraits:
    """The CPU routines of a type."""
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    return library.ggml_get_type_traits_cpu(block_format(name).ggml_id).contents


def ggml_matmul(library: ctypes.CDLL, name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`x @ W.T` by quantizing each row of `x` and calling `vec_dot`, as ggml's matrix product does."""
    weights = ggml_traits(library, name)
    partner = FORMATS[name].activation
    assert partner is not None
    activation = FORMATS[partner]
    assert weights.vec_dot_type == activation.ggml_id
    quantize = _FROM_FLOAT(ggml_traits(library, partner).from_float)
    vec_dot = _VEC_DOT(weights.vec_dot)
    packed = np.ascontiguousarray(packed)
    out = np.empty((len(x), len(packed)), np.float32)
    for token, row in enumerate(np.ascontiguousarray(x, np.float32)):
        quantized = np.zeros(row.size // activation.block_size * activation.block_bytes, np.uint8)
        quantize(row.ctypes.data, quantized.ctypes.data, row.size)
        for index in range(len(packed)):
            target = out[token, index:].ctypes.data
            vec_dot(row.size, target, 0, packed[index].ctypes.data, 0, quantized.ctypes.data, 0, 1)
    return out


def relative_rms(difference: np.ndarray, reference: np.ndarray) -> float:
    """rms(difference) / rms(reference), in float64."""
    return float(np.linalg.norm(difference.astype(np.float64)) / np.linalg.norm(reference.astype(np.float64)))


def value_cases(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32 `[64, 1024]` of the kinds that quantizers treat differently."""
    shape = (64, 1024)
    per_row = (64, 1)
    cases = {
        "normal": rng.normal(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "all positive": rng.uniform(1, 2, shape),
        "all negative": -rng.uniform(1, 2, shape),
        "heavy tails": rng.standard_t(1.5, size=shape),
        "constant": np.repeat(rng.normal(size=per_row), 1024, 1),
        "zero": np.zeros(shape),
        "negative zero": -np.zeros(shape),
        "half integers": rng.integers(-254, 255, shape) / 2,
        "tied extremes": rng.choice([-1, 1, 0.5, 0], shape),
        "sparse": rng.normal(size=shape) * (rng.random(shape) < 0.02),
        "one-hot": np.eye(*shape),
        "tiny": rng.normal(size=shape) * 10.0 ** rng.uniform(-36, -3, per_row),
        "huge": rng.normal(size=shape) * 10.0 ** rng.uniform(0, 37, per_row),
        "groups far apart": rng.normal(size=shape) * np.repeat(10.0 ** rng.uniform(-18, 3, (64, 64)), 16, 1),
    }
    return {name: np.ascontiguousarray(values, np.float32) for name, values in cases.items()}


def ggml_float_dots(library: ctypes.CDLL, name: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`vec_dot` of a plain type, row by row: float32 `[n, width]` twice -> `[n]`, both rounded to the type first."""
    vec_dot = _VEC_DOT(ggml_traits(library, name).vec_dot)
    left, right = (
        encode(name, np.ascontiguousarray(side, np.float32)).reshape(len(side), -1) for side in (left, right)
    )
    out = np.empty(len(left), np.float32)
    width = left.shape[1] // FORMATS[name].block_bytes
    for index in range(len(left)):
        target = out[index:].ctypes.data
        vec_dot(width, target, 0, left[index].ctypes.data, 0, right[index].ctypes.data, 0, 1)
    return out


def adversarial_weights(name: str, columns: int, rng: np.random.Generator) -> np.ndarray:
    """`uint8[rows, blocks, block_bytes]`: saturated and empty codes, and scales that are zero, subnormal, 1 or huge."""
    blocks = FORMATS[name]
    first, end = SCALE_BYTES.get(name, (0, 2))
    count = columns // blocks.block_size
    codes = [np.full((count, blocks.block_bytes), fill, np.uint8) for fill in (0x00, 0xFF, 0x80, 0x7F, 0x88, 0xF0)]
    # Q8_0 and the group scales of Q6_K: ±127 and -128 in turn.
    codes.append(np.resize(np.array([0x7F, 0x81, 0x80], np.uint8), (count, blocks.block_bytes)))
    codes.append(random_blocks(name, (count,), rng))
    rows = []
    # Zero, the smallest float16, the largest subnormal, one, minus one, the largest.
    for scale in (0.0, 2**-24, 2**-14 - 2**-24, 1.0, -1.0, 65504.0):
        for row in codes:
            packed = row.copy()
            packed[:, first:end] = np.full((end - first) // 2, scale, "<f2").view(np.uint8)
            rows.append(packed)
    # Scales of very different size within a row, and one block alone.
    mixed = random_blocks(name, (4, count), rng)
    scales = rng.normal(size=(4, count, (end - first) // 2)) * 10.0 ** rng.uniform(-7, 4, (4, count, 1))
    mixed[..., first:end] = scales.astype("<f2").view(np.uint8)
    mixed[3, 1:, first:end] = 0
    return np.concatenate([np.stack(rows), mixed])


def run_jobs(library: Path, jobs: list[dict[str, Any]], arrays: dict[str, Any], *, tiled: bool, folder: Path) -> Any:
    """Every job's result, by its number, of ggml in a process of its own."""
    given, made = folder / "given.npz", folder / "made.npz"
    np.savez(given, jobs=json.dumps(jobs), **arrays)
    script = Path(__file__).with_name("ggml_products.py")
    done = subprocess.run(
        [sys.executable, str(script), str(library), str(given), str(made)],
        env={**os.environ, "GGML_CPU_TILED_MM": "1" if tiled else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(made) as results:
        return [results[str(number)] for number in range(len(jobs))]
