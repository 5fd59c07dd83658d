"""Where `make peers` puts llama.cpp's other builds: `library=DIR` of a live side takes such a folder."""

from __future__ import annotations

import os
from pathlib import Path

from aprjax.checkpoint.fetch import cache_folder
from aprjax.trace.ggml_nodes import KNOWN_PYTHON_PACKAGE


def builds_folder() -> Path:
    """`$APRJAX_LLAMA_BUILDS`, or `llama.cpp-VERSION` in the cache."""
    chosen = os.environ.get("APRJAX_LLAMA_BUILDS")
    return Path(chosen) if chosen else cache_folder() / f"llama.cpp-{KNOWN_PYTHON_PACKAGE}"


def installed_builds() -> dict[str, Path]:
    """Folders of shared libraries by the name of the build, as far as they are there.

    `default` is what `pip install llama-cpp-python` builds: repacked weights, tiles, tinyBLAS, and every instruction
    of the processor at hand. `avx2` is the same without instructions beyond AVX2, so that its bits are the same
    everywhere.
    """
    # The mark is made when a build is complete.
    return {mark.parent.name: mark.parent for mark in sorted(builds_folder().glob("*/.built"))}
