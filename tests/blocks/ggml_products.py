"""Runs matrix products as ggml dispatches them, in a process of its own: one library folder, one setting of its tiles.

    python ggml_products.py FOLDER GIVEN.npz MADE.npz

`GIVEN.npz` holds `jobs` (a JSON list) and the jobs' arrays. A job is {"kind": "product", "type": ggml id, "repack":
bool, "weights": key, "x": key} or {"kind": "attention", "q": key, "k": key, "v": key, "mask": key, "scale": float}; its
result is `MADE.npz`'s array of the job's number. `GGML_CPU_TILED_MM` is read when the library loads: the caller sets
it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_F32, _F16 = 0, 1
_POINTER, _SIZE, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_BUFFER_TYPES = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of libggml-base and libggml-cpu that a graph of one operation takes."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        for library, name, result, arguments in (
            (self.base, "ggml_init", _POINTER, [_InitParams]),
            (self.base, "ggml_free", None, [_POINTER]),
            (self.base, "ggml_new_tensor_2d", _POINTER, [_POINTER, ctypes.c_int, _LONG, _LONG]),
            (self.base, "ggml_new_tensor_3d", _POINTER, [_POINTER, ctypes.c_int, _LONG, _LONG, _LONG]),
            (self.base, "ggml_mul_mat", _POINTER, [_POINTER] * 3),
            (self.base, "ggml_flash_attn_ext", _POINTER, [_POINTER] * 5 + [ctypes.c_float] * 3),
            (self.base, "ggml_new_graph", _POINTER, [_POINTER]),
            (self.base, "ggml_build_forward_expand", None, [_POINTER, _POINTER]),
            (self.base, "ggml_nbytes", _SIZE, [_POINTER]),
            (self.base, "ggml_backend_buft_alloc_buffer", _POINTER, [_POINTER, _SIZE]),
            (self.base, "ggml_backend_buffer_get_base", _POINTER, [_POINTER]),
            (self.base, "ggml_backend_buffer_free", None, [_POINTER]),
            (self.base, "ggml_backend_tensor_alloc", ctypes.c_int, [_POINTER] * 3),
            (self.base, "ggml_backend_alloc_ctx_tensors", _POINTER, [_POINTER, _POINTER]),
            (self.base, "ggml_backend_tensor_set", None, [_POINTER, _POINTER, _SIZE, _SIZE]),
            (self.base, "ggml_backend_tensor_get", None, [_POINTER, _POINTER, _SIZE, _SIZE]),
            (self.base, "ggml_backend_graph_compute", ctypes.c_int, [_POINTER, _POINTER]),
            (self.base, "ggml_backend_reg_dev_get", _POINTER, [_POINTER, _SIZE]),
            (self.base, "ggml_backend_reg_get_proc_address", _POINTER, [_POINTER, ctypes.c_char_p]),
            (self.cpu, "ggml_backend_cpu_reg", _POINTER, []),
            (self.cpu, "ggml_backend_cpu_init", _POINTER, []),
            (self.cpu, "ggml_backend_cpu_set_n_threads", None, [_POINTER, ctypes.c_int]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, 2)

    def extra_buffer_type(self) -> Any:
        """The buffer type that re-lays weights as they are written to it."""
        registry = self.cpu.ggml_backend_cpu_reg()
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        types = _BUFFER_TYPES(address)(self.base.ggml_backend_reg_dev_get(registry, 0))
        assert types[0], "the library repacks nothing"
        return types[0]

    def run(self, build: Any, given: list[tuple[Any, np.ndarray]], shape: tuple[int, ...], extra: Any = None) -> Any:
        """The value of one operation; `extra` is a buffer to be freed."""
        context, result = build
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, result)
        buffer = self.base.ggml_backend_alloc_ctx_tensors(context, self.backend)
        for tensor, array in given:
            assert self.base.ggml_nbytes(tensor) == array.nbytes
            self.base.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
        assert self.base.ggml_backend_graph_compute(self.backend, graph) == 0
        out = np.empty(shape, np.float32)
        self.base.ggml_backend_tensor_get(result, out.ctypes.data, 0, out.nbytes)
        for one in filter(None, (buffer, extra)):
            self.base.ggml_backend_buffer_free(one)
        self.base.ggml_free(context)
        return out

    def context(self) -> Any:
        return self.base.ggml_init(_InitParams(1 << 22, None, True))

    def product(self, type_id: int, weights: np.ndarray, x: np.ndarray, *, repack: bool) -> np.ndarray:
        """`x[tokens, width]` by encoded rows `[rows, …]`: float32 `[tokens, rows]`."""
        context, (tokens, width), rows = self.context(), x.shape, len(weights)
        left = self.base.ggml_new_tensor_2d(context, type_id, width, rows)
        right = self.base.ggml_new_tensor_2d(context, _F32, width, tokens)
        extra = None
        if repack:
            extra = self.base.ggml_backend_buft_alloc_buffer(self.extra_buffer_type(), weights.nbytes + 4096)
            assert self.base.ggml_backend_tensor_alloc(extra, left, self.base.ggml_backend_buffer_get_base(extra)) == 0
        result = self.base.ggml_mul_mat(context, left, right)
        return self.run((context, result), [(left, weights), (right, x)], (tokens, rows), extra)

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """`q[head, position, channel]` by float16 `k`, `v[kv head, key, channel]`, mask float16 `[position, key]`."""
        context = self.context()
        (heads, positions, channels), keys = q.shape, k.shape[1]
        tensors = [
            self.base.ggml_new_tensor_3d(context, kind, *a.shape[::-1]) for kind, a in ((_F32, q), (_F16, k), (_F16, v))
        ]
        masked = self.base.ggml_new_tensor_2d(context, _F16, keys, positions)
        result = self.base.ggml_flash_attn_ext(context, *tensors, masked, scale, 0.0, 0.0)
        given = list(zip([*tensors, masked], (q, k, v, mask), strict=True))
        return self.run((context, result), given, (positions, heads, channels))


def main() -> None:
    folder, given, made = (Path(argument) for argument in sys.argv[1:])
    ggml, results = Ggml(folder), {}
    with np.load(given) as arrays:
        for number, job in enumerate(json.loads(str(arrays["jobs"]))):
            if job["kind"] == "product":
                weights, x = (np.ascontiguousarray(arrays[job[key]]) for key in ("weights", "x"))
                results[str(number)] = ggml.product(job["type"], weights, x, repack=job["repack"])
            else:
                q, k, v, mask = (np.ascontiguousarray(arrays[job[key]]) for key in ("q", "k", "v", "mask"))
                results[str(number)] = ggml.attention(q, k, v, mask, job["scale"])
    np.savez(made, **results)


if __name__ == "__main__":
    main()
