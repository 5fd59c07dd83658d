"""Whether the device multiplies bfloat16, or float16, at more than the speed of float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

# Linux's names of the x86 instruction sets that XLA's CPU products use.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def accelerated() -> bool:
    """Whether programs run on an accelerator, whose matrix units take 16 bits and add up in float32."""
    import jax

    return jax.default_backend() != "cpu"


def fast_bfloat16() -> bool:
    """Accelerators do; of processors those that say so. Where it cannot be known, they do not."""
    return accelerated() or _processor_has_bfloat16()


def fast_float16() -> bool:
    """Accelerators do. XLA's CPU backend computes float16 in float32."""
    return accelerated()


@cache
def _processor_has_bfloat16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(not _INSTRUCTIONS.isdisjoint(line.split()) for line in lines if line.startswith("flags"))
