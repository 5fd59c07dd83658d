"""XLA's persistent compilation cache, where it is safe.

XLA's CPU programs are machine code for one processor and one jaxlib: entries of another can crash
(peers-and-style.md, C17). So the cache lies in a folder of its own for each pair of both, and
`APRJAX_COMPILATION_CACHE=off` does without it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from aprjax.checkpoint.fetch import cache_folder

# Programs that compile faster than this cost more to look up than to compile again.
_WORTH_KEEPING_SECONDS = 0.1


def enable_compilation_cache() -> Path | None:
    """Switches the cache on for this process; returns its folder, or None where it is off."""
    if os.environ.get("APRJAX_COMPILATION_CACHE") == "off":
        return None
    import jax

    folder = cache_folder() / "xla" / f"jaxlib-{version('jaxlib')}-{_processor()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)
    return folder


def _processor() -> str:
    """A digest of the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description = "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        description = f"{platform.machine()} {platform.processor()} {platform.platform()}"
    return hashlib.sha256(description.encode()).hexdigest()[:16]
