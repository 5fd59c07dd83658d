"""Where a measurement was made: machine, versions and commit, without anything that names a person or place."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from aprjax import __version__
from aprjax.trace.commit import source_commit

# What computes, or decides what is computed.
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers", "safetensors", "llama-cpp-python", "transformers")
PACKAGES += ("torch", "PyYAML")

# An absolute path of two components or more. What stands before it must not be part of a word, a URL or a path. The
# folders that every system has (`#!/bin/sh`) are nobody's.
_ABSOLUTE = re.compile(
    r"(?<![\w./~…])/(?!(?:bin|dev|etc|lib|lib64|proc|sbin|sys|usr)/)"
    r"(?:[^\s/\"'`,;:()\[\]<>|]+/)+([^\s/\"'`,;:()\[\]<>|]+)"
)
_DRIVE = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\s\\\"']+\\)*([^\s\\\"']+)")

# Folders that somebody's files lie in. A model may well write of `/var/log`, and that is nobody's.
_PRIVATE = re.compile(r"(?<![\w./~…])/(?:home|root|Users|work|tmp|mnt|media|srv|scratch)/[^\s\"'\\]+")


def host_facts() -> dict[str, Any]:
    """Processor, cores, memory and system; neither the host's name nor the user's."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_bytes": _memory(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def version_facts() -> dict[str, Any]:
    """Versions of Python, aprjax and what it computes with, and the commit that ran; absent packages are null."""
    commit, modified = source_commit()
    return {
        "python": platform.python_version(),
        "aprjax": __version__,
        "git_commit": commit,
        "git_modified": modified,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def without_places(value: Any) -> Any:
    """The value with every absolute path in its texts cut to `…/name`: evidence says what was run, not where.

    Dicts, lists and tuples are searched; keys stay as they are.
    """
    if isinstance(value, str):
        return _DRIVE.sub(r"…/\1", _ABSOLUTE.sub(r"…/\1", value))
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return value


def names_a_place(text: str) -> str | None:
    """The first path into a folder of somebody's machine in a text, if there is one."""
    found = _PRIVATE.search(text)
    return None if found is None else found[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def _cores() -> int:
    # What the process may use, where the system says so: a container's share, not the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
