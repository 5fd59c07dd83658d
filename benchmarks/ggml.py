"""ggml's functions of one row, by ctypes: `to_float` and `vec_dot` of the installed llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_POINTER, _LONG, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
_TO_FLOAT = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)
_FROM_FLOAT = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)
_VEC_DOT = ctypes.CFUNCTYPE(None, _INT, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT)


class _Traits(ctypes.Structure):
    """`ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", _LONG),
        ("block_size_interleave", _LONG),
        ("type_size", _SIZE),
        ("quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", _FROM_FLOAT),
    )


class _CpuTraits(ctypes.Structure):
    """`ggml_type_traits_cpu`."""

    _fields_ = (("from_float", _FROM_FLOAT), ("vec_dot", _VEC_DOT), ("vec_dot_type", _INT), ("rows", _LONG))


@dataclass
class Ggml:
    """The libraries, with their tables initialised."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL

    @classmethod
    def load(cls) -> Ggml:
        """Of the installed llama-cpp-python."""
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("llama-cpp-python is not installed; likely fix: make peers")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        base, cpu = (
            ctypes.CDLL(str(folder / f"lib{stem}.so"), mode=ctypes.RTLD_GLOBAL) for stem in ("ggml-base", "ggml-cpu")
        )
        cpu.ggml_cpu_init()
        base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
        return cls(base, cpu)

    def decoder(self, ggml_id: int | None, packed: np.ndarray, size: int) -> Callable[[], np.ndarray]:
        """A call that decodes `packed` into `size` numbers, on one thread."""
        out = np.empty(size, np.float32)
        to_float = self.base.ggml_get_type_traits(ggml_id).contents.to_float

        def run() -> np.ndarray:
            to_float(packed.ctypes.data, out.ctypes.data, size)
            return out

        return run

    def dots(self, ggml_id: int | None, packed: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
        """A call that multiplies every row of `packed` with `x`, quantizing `x` first, on one thread.

        The loop over rows is Python's, which costs a microsecond or two for each: rows should be long.
        """
        traits = self.cpu.ggml_get_type_traits_cpu(ggml_id).contents
        partner = self.cpu.ggml_get_type_traits_cpu(traits.vec_dot_type).contents
        quantized, out = np.empty(2 * x.size, np.uint8), np.empty(len(packed), np.float32)
        step, start, end = packed.strides[0], packed.ctypes.data, out.ctypes.data
        from_float, dot, size = partner.from_float, traits.vec_dot, x.size

        def run() -> np.ndarray:
            from_float(x.ctypes.data, quantized.ctypes.data, size)
            other = quantized.ctypes.data
            for row in range(len(packed)):
                dot(size, end + 4 * row, 0, start + step * row, 0, other, 0, 1)
            return out

        return run
