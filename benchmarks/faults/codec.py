"""Values of encoded tensors, and back: decoding by gguf-py, encoding by ggml itself where it is installed.

Neither shares code with `aprjax.blocks`, whose reading of the bytes is what planted faults put to the test. gguf-py has
no K-quant encoder; without llama-cpp-python that one thing is aprjax's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from container import Tensor

FLOAT_TYPES = {"F32": "<f4", "F16": "<f2"}


def decode(tensor: Tensor) -> np.ndarray:
    """Values, `float32[*shape]`."""
    return decode_bytes(tensor.whole(), tensor.type_name, tensor.shape)


def decode_bytes(data: bytes | np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of bytes of a block type, `float32[*shape]`."""
    kind = gguf.GGMLQuantizationType[type_name]
    raw = np.frombuffer(data, np.uint8)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, kind).reshape(shape).astype(np.float32)


def encode(values: np.ndarray, type_name: str) -> bytes:
    """Bytes of a block type, rows one after the other."""
    if type_name in FLOAT_TYPES:
        return values.astype(FLOAT_TYPES[type_name]).tobytes()
    values = np.ascontiguousarray(values, np.float32)
    kind = gguf.GGMLQuantizationType[type_name]
    library = _ggml()
    if library is not None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty(values.size // block * size, np.uint8)
        rows = values.size // values.shape[-1]
        source, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, out))
        written = library.ggml_quantize_chunk(int(kind), source, target, 0, rows, values.shape[-1], None)
        assert written == out.nbytes
        return out.tobytes()
    try:
        return np.ascontiguousarray(gguf.quants.quantize(values, kind)).tobytes()
    except NotImplementedError:
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from aprjax.blocks import encode as encode_blocks

        return encode_blocks(type_name, values).tobytes()


@cache
def _ggml() -> Any:
    """libggml-base of llama-cpp-python, or None. Its quantizers need no tables, so nothing has to be initialised."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (folder / name).is_file():
            library = ctypes.CDLL(str(folder / name))
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            library.ggml_quantize_chunk.argtypes = (
                [ctypes.c_int]
                + [ctypes.c_void_p] * 2
                + [ctypes.c_int64] * 3
                + [
                    ctypes.c_void_p,
                ]
            )
            return library
    return None
