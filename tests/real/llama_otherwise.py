"""llama.cpp with another rotary base and another epsilon than its file says: `llama_otherwise.py BASE EPS`.

It stands in for `aprjax.trace.llama_cpp_child`: the same request on stdin, the same trace. The engine itself is told,
by its own parameters, so that nothing of aprjax has a hand in the fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp

from aprjax.trace import llama_cpp_child

_KEPT_ALIVE: list[Any] = []


def _with_base(make: Callable[[], Any], base: float) -> Callable[[], Any]:
    def made() -> Any:
        settings = make()
        settings.rope_freq_base = base
        return settings

    return made


def _with_epsilon(make: Callable[[], Any], epsilon: float) -> Callable[[], Any]:
    def made() -> Any:
        settings = make()
        # An empty key ends the list.
        overrides = (llama_cpp.llama_model_kv_override * 2)()
        overrides[0].key = b"qwen2.attention.layer_norm_rms_epsilon"
        overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT
        overrides[0].value.val_f64 = epsilon
        _KEPT_ALIVE.append(overrides)
        settings.kv_overrides = ctypes.cast(overrides, ctypes.POINTER(llama_cpp.llama_model_kv_override))
        return settings

    return made


if __name__ == "__main__":
    base, epsilon = map(float, sys.argv[1:3])
    llama_cpp.llama_context_default_params = _with_base(llama_cpp.llama_context_default_params, base)
    llama_cpp.llama_model_default_params = _with_epsilon(llama_cpp.llama_model_default_params, epsilon)
    sys.exit(llama_cpp_child.main())
