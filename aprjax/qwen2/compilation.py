"""XLA's persistent compilation cache, where it is safe.

XLA's CPU programs are machine code for one processor and one jaxlib: entries of another can crash
(peers-and-style.md, C17). So the cache lies in a folder of its own for each pair of both, and
`APRJAX_COMPILATION_CACHE=off` does without it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.fetch import cache_folder

# Programs that compile faster than this cost more to look up than to compile again.
_WORTH_KEEPING_SECONDS = 0.1


def enable_compilation_cache() -> Path | None:
    """Switches the cache on for this process; returns its folder, or None where it is off."""
    if os.environ.get("APRJAX_COMPILATION_CACHE") == "off":
        return None
    import jax

    _write_whole_entries()
    folder = cache_folder() / "xla" / f"jaxlib-{version('jaxlib')}-{_processor()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)
    return folder


@cache
def _write_whole_entries() -> None:
    """Makes jax's cache write its entries whole or not at all.

    jax 0.10 writes an entry in place (`LRUCache.put`, lru_cache.py). What a killed process or a full disk leaves of one
    every later run fails to read, warns of and compiles again, and none replaces it. The cache's class is no public
    name: where another jax has it elsewhere, entries are written as that jax does.
    """
    from jax._src import lru_cache

    names = ("LRUCache", "_CACHE_SUFFIX")
    if not all(hasattr(lru_cache, name) for name in names) or not hasattr(lru_cache.LRUCache, "put"):
        return
    in_place = lru_cache.LRUCache.put

    def put(self: Any, key: str, value: bytes) -> None:
        # With etils installed it is no `pathlib.Path`, though the folder is one on this machine.
        folder = Path(os.fspath(getattr(self, "path", "")))
        if not key or not folder.is_dir() or getattr(self, "eviction_enabled", True):
            in_place(self, key, value)
            return
        entry = folder / f"{key}{lru_cache._CACHE_SUFFIX}"
        if not entry.exists():
            with atomic_file(entry) as stream:
                stream.write(value)

    lru_cache.LRUCache.put = put


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
