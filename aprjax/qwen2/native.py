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
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from aprjax.blocks.native.product import INSTRUCTIONS, SOURCE, SYMBOL
from aprjax.checkpoint.fetch import cache_folder

# Contractions of multiply and add would change bits. Warnings of the compiler's own headers are nobody's concern.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-w", *(f"-m{name}" for name in INSTRUCTIONS))
_COMPILERS = ("g++", "clang++", "c++")
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
    library = library_path()
    refusal = library.with_suffix(".refused")
    if not library.exists():
        if refusal.exists():
            return NativeProducts(None, f"refused before: see {refusal}")
        try:
            problem = build(library)
        except OSError as error:
            return NativeProducts(None, f"{library.parent} cannot be written: {error}")
        if problem is not None:
            return NativeProducts(None, problem)
    target = f"{SYMBOL}_{_key()}"
    try:
        register(library, target)
    except OSError as error:
        return NativeProducts(None, f"{library} cannot be loaded: {error}")
    return NativeProducts(target, str(library))


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


def library_path() -> Path:
    """Where the compiled kernel lies, or is to lie."""
    return cache_folder() / "native" / f"{SYMBOL}-{_key()}.so"


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of the usual ones that is there."""
    names = (os.environ.get("CXX"), *_COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(library: Path) -> str | None:
    """Compiles the kernel, checks it in another process, and gives it its name.

    Two processes may build at once: both are whole, and one of them stays.

    Returns:
        None, or why there is no kernel. What will not be otherwise next time (the compiler fails, the bits differ) is
        written beside `library` with its details, and not tried again.

    Raises:
        OSError: the folder cannot be written.
    """
    import jax

    program = compiler()
    if program is None:
        return f"no C++ compiler ({', '.join(_COMPILERS)}; $CXX names another)"
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
        made = Path(folder) / library.name
        # As a system's headers: the compiler does not warn of them.
        headers = ("-isystem", jax.ffi.include_dir())
        problem = _run(program, *_FLAGS, *headers, str(SOURCE), "-o", str(made))
        if problem is None:
            problem = _run(sys.executable, "-m", "aprjax.qwen2.native_check", str(made))
        if problem is None:
            os.replace(made, library)
            return None
        (Path(folder) / "refused").write_text(f"{problem}\n", encoding="utf-8")
        refusal = library.with_suffix(".refused")
        os.replace(Path(folder) / "refused", refusal)
    return f"{problem.splitlines()[0]} (details: {refusal})"


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
