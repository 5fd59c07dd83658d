"""Whether the device multiplies bfloat16 at more than the speed of float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

# Linux's names of the x86 instruction sets that XLA's CPU products use.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


@cache
def fast_bfloat16() -> bool:
    """Accelerators do; of processors those that say so. Where it cannot be known, they do not."""
    import jax

    if jax.default_backend() != "cpu":
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(not _INSTRUCTIONS.isdisjoint(line.split()) for line in lines if line.startswith("flags"))
