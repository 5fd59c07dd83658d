"""The kernel of integer products (`aprjax.blocks.native`): compiled once on the user's machine, checked, then loaded.

Wheels for every processor would have to be built and kept; a C++ compiler is where people build llama.cpp. So the
source is in the package, and the first product on a processor with AVX-512 VNNI has it compiled (4 s) into the cache,
under a name that stands for the source, the flags and the jaxlib whose headers it was made with. Before it gets that
name another process compares its bits with those of XLA's program (5 s): a kernel that differs, or that the processor
kills, is never used. Without a compiler, on other processors and on accelerators XLA computes the products, with the
same bits.

`APRJAX_NATIVE=off` does without the kernel; `APRJAX_NATIVE=required` makes it an error that there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from aprjax.blocks.native.product import INSTRUCTIONS, SOURCE, SYMBOL
from aprjax.checkpoint.atomic import atomic_folder
from aprjax.checkpoint.fetch import cache_folder
from aprjax.checkpoint.types import CheckpointError

# Contractions of multiply and add would change bits. Warnings of the compiler's own headers are nobody's concern.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-w", *(f"-m{name}" for name in INSTRUCTIONS))
_COMPILERS = ("g++", "clang++", "c++")
_LIBRARY, _REFUSAL = "kernel.so", "refused.txt"
# Compiling takes 4 s here, checking 5 s: twenty times that is a compiler that hangs.
_PATIENCE_SECONDS = 120


class NativeError(OSError):
    """What `APRJAX_NATIVE` asks for cannot be had."""


@dataclass(frozen=True)
class NativeProducts:
    """Whether the kernel is in use.

    Attributes:
        target: the name under which XLA knows it, or None.
        reason: one line: where it lies, or why there is none.
    """

    target: str | None
    reason: str


# Threads load models side by side: one of them builds, the others wait.
_BUILDING = threading.Lock()


def native_products() -> NativeProducts:
    """The kernel, compiled and registered by the first call in a process.

    Raises:
        NativeError: there is none, and `APRJAX_NATIVE=required`; or that variable has another value.
    """
    with _BUILDING:
        return _wanted()


@cache
def _wanted() -> NativeProducts:
    wanted = os.environ.get("APRJAX_NATIVE", "")
    if wanted == "off":
        return NativeProducts(None, "APRJAX_NATIVE=off")
    if wanted not in ("", "required"):
        raise NativeError(f"APRJAX_NATIVE is off or required, or not set: found {wanted!r}")
    found = _found()
    if found.target is None and wanted == "required":
        raise NativeError(f"APRJAX_NATIVE=required, and integer products have no kernel of their own: {found.reason}")
    return found


def _found() -> NativeProducts:
    import jax

    if (backend := jax.default_backend()) != "cpu":
        return NativeProducts(None, f"products run on the {backend} backend")
    if missing := sorted(set(INSTRUCTIONS.values()) - processor_flags()):
        return NativeProducts(None, f"the processor lacks {', '.join(missing)}")
    folder = kernel_folder()
    if not folder.exists():
        program = compiler()
        if program is None:
            return NativeProducts(None, f"no C++ compiler ({', '.join(_COMPILERS)}; $CXX names another)")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            build(folder, program)
        except (OSError, CheckpointError) as error:
            # Another process may have built it meanwhile.
            if not folder.exists():
                return NativeProducts(None, f"{folder.parent} cannot be written: {error}")
    if (refusal := folder / _REFUSAL).exists():
        summary = refusal.read_text(encoding="utf-8").splitlines()[0]
        return NativeProducts(None, f"{summary}: see {refusal}; to try again, remove its folder")
    target = f"{SYMBOL}_{_key()}"
    try:
        register(folder / _LIBRARY, target)
    except OSError as error:
        return NativeProducts(None, f"{folder / _LIBRARY} cannot be loaded: {error}")
    return NativeProducts(target, str(folder / _LIBRARY))


def processor_flags() -> set[str]:
    """The instruction sets that Linux says the processor has; none where it cannot be asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


@cache
def _key() -> str:
    stamp = "\n".join((SOURCE.read_text(encoding="utf-8"), *_FLAGS, version("jaxlib")))
    return hashlib.sha256(stamp.encode()).hexdigest()[:16]


def kernel_folder() -> Path:
    """Where the compiled kernel lies, or is to lie, or what is wrong with it."""
    return cache_folder() / "native" / f"{SYMBOL}-{_key()}"


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of the usual ones that is there."""
    names = (os.environ.get("CXX"), *_COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(folder: Path, program: str) -> None:
    """Compiles the kernel and checks it in another process; `folder` then holds it, or why there is none.

    What was refused (the compiler fails, the bits differ) will be the next time, too: it is not tried again.

    Raises:
        CheckpointError: the folder cannot be written, or another process has just done so.
    """
    import jax

    with atomic_folder(folder) as made:
        library = made / _LIBRARY
        # As a system's headers: the compiler does not warn of them.
        headers = ("-isystem", jax.ffi.include_dir())
        problem = _run(program, *_FLAGS, *headers, str(SOURCE), "-o", str(library))
        if problem is None:
            problem = _run(sys.executable, "-m", "aprjax.qwen2.native_check", str(library))
        if problem is not None:
            library.unlink(missing_ok=True)
            (made / _REFUSAL).write_text(f"{problem}\n", encoding="utf-8")


def _run(*command: str) -> str | None:
    """Runs a step; None, or what was wrong, its first line a summary."""
    environment = {**os.environ, "APRJAX_NATIVE": "off", "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"{Path(command[0]).name} had not ended after {_PATIENCE_SECONDS} s\n{' '.join(command)}"
    if done.returncode == 0:
        return None
    said = f"{done.stdout}{done.stderr}".strip()
    return f"{Path(command[0]).name} ended with {done.returncode}\n{' '.join(command)}\n{said}"


def register(library: Path, target: str) -> None:
    """Makes the compiled kernel known to XLA as `target`.

    Raises:
        OSError: it cannot be loaded.
    """
    import jax

    function = getattr(ctypes.CDLL(str(library)), SYMBOL)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
