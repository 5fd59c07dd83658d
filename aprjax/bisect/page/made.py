"""What made a report: command, versions, platform and time, for whoever is sent it."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aprjax import __version__


def stamped(document: dict[str, Any]) -> dict[str, Any]:
    """The report's JSON with the field `made`; one that has it is left as it is.

    Whatever runs inside another program (a notebook, a test) has no command line of its own and records none.
    """
    if "made" in document:
        return document
    own = sys.argv[:1] and sys.argv[0].replace("\\", "/").split("/")[-1] in ("aprjax", "aprjax.exe", "__main__.py")
    made = {
        "command": shlex.join(["aprjax", *sys.argv[1:]]) if own else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()}, {_device()}",
        "aprjax": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "numpy")},
    }
    return {**document, "made": made}


def _device() -> str:
    """What computed; of a command that did without jax (`files`, `tokens`) only the machine's kind."""
    if "jax" not in sys.modules:
        return platform.machine()
    from aprjax.trace.trace import this_platform

    return this_platform()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
