"""Fixtures that every test may use: the real models and the peers, each with a reason when absent.

A machine without a model or a peer skips its tests and says why. CI installs all of them, so there
`APRJAX_REQUIRE_MODELS=1` and `APRJAX_REQUIRE_PEERS=1` turn each such skip into a failure: a test
that silently stopped running is worse than one that fails.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from browser import Browser

ROOT = Path(__file__).resolve().parent.parent

# Read by ggml when its CPU library starts: the tiled kernels sum in another order than the plain
# ones, which are the oracle. Set before any test can load the library.
os.environ["GGML_CPU_TILED_MM"] = "0"
# No test may wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def absent(what: str, fix: str, *, required_by: str) -> None:
    """Skips the test, or fails it where the environment variable `required_by` is set to 1."""
    message = f"{what}; {fix}"
    if os.environ.get(required_by) == "1":
        pytest.fail(f"{message} ({required_by}=1 makes this a failure)")
    pytest.skip(message)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return ROOT


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """`model_path("qwen2.5-coder-0.5b")` is the fetched GGUF file. Mark such tests `real_model`."""
    from aprjax.checkpoint.fetch import model_location

    def find(name: str) -> Path:
        path = model_location(name)
        if not path.is_file():
            absent(
                f"the model {name} is not at {path}",
                f"fetch it with `python -m aprjax fetch {name}`",
                required_by="APRJAX_REQUIRE_MODELS",
            )
        return path

    return find


@pytest.fixture(scope="session")
def native_target() -> str:
    """The name under which XLA knows the kernel of integer products, where processor and compiler allow one."""
    from aprjax.qwen2.native import INSTRUCTIONS, compiler, native_products, processor_flags

    found = native_products()
    if found.target is None:
        if compiler() is not None and processor_flags() >= set(INSTRUCTIONS.values()):
            pytest.fail(found.reason)
        pytest.skip(found.reason)
    return found.target


@dataclass(frozen=True)
class LlamaLibrary:
    """The shared libraries of the installed llama-cpp-python, tables initialised.

    Attributes:
        folder: the folder that holds them.
        base: `libggml-base`: `quantize_row_*_ref`, `dequantize_row_*`, `ggml_type_name`.
        cpu: `libggml-cpu`: `ggml_get_type_traits_cpu`, `quantize_row_*` as the engine runs them.
        llama: `libllama`.
    """

    folder: Path
    base: ctypes.CDLL
    cpu: ctypes.CDLL
    llama: ctypes.CDLL


@pytest.fixture(scope="session")
def llama_library() -> LlamaLibrary:
    """The plain build of llama.cpp through ctypes. Mark such tests `llama_cpp`."""
    fix = "install it with `make peers`"
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        absent("llama-cpp-python is not installed", fix, required_by="APRJAX_REQUIRE_PEERS")
        raise AssertionError  # unreachable: `absent` skips or fails
    folder = Path(spec.submodule_search_locations[0]) / "lib"

    def load(stem: str) -> ctypes.CDLL:
        for name in (f"lib{stem}.so", f"lib{stem}.dylib", f"{stem}.dll"):
            if (folder / name).is_file():
                return ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        pytest.fail(f"llama-cpp-python is installed but {folder} has no {stem} library")

    # In this order: each needs the ones before it, and finds them by the name they were loaded under.
    base, cpu, llama = load("ggml-base"), load("ggml-cpu"), load("llama")
    # Without this the float16 tables are zero, and so is every result that needs them.
    cpu.ggml_cpu_init()
    llama.llama_print_system_info.restype = ctypes.c_char_p
    features = llama.llama_print_system_info().decode()
    if "REPACK = 1" in features or "LLAMAFILE = 1" in features:
        absent(
            f"the installed llama.cpp is not the plain build ({features.strip()})",
            fix,
            required_by="APRJAX_REQUIRE_PEERS",
        )
    return LlamaLibrary(folder=folder, base=base, cpu=cpu, llama=llama)


@pytest.fixture(scope="session")
def llama_build() -> Callable[[str], Path]:
    """`llama_build("default")` is the folder of another build's libraries. Mark such tests `llama_cpp`."""
    from aprjax.trace.llama_builds import installed_builds

    def find(name: str) -> Path:
        if importlib.util.find_spec("llama_cpp") is None:
            # It drives every build; the builds alone may lie in the cache from another environment.
            absent(
                "llama-cpp-python is not installed", "install it with `make peers`", required_by="APRJAX_REQUIRE_PEERS"
            )
        folder = installed_builds().get(name)
        if folder is None:
            absent(
                f"llama.cpp's build {name!r} is not there",
                "make it with `make peers`",
                required_by="APRJAX_REQUIRE_PEERS",
            )
            raise AssertionError  # unreachable: `absent` skips or fails
        return folder

    return find


@pytest.fixture(scope="session")
def llama_cpp(llama_library: LlamaLibrary) -> ModuleType:
    """The Python module `llama_cpp` on the same plain libraries. Mark such tests `llama_cpp`."""
    import llama_cpp

    return llama_cpp


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The module `transformers`, with torch beside it. Mark such tests `transformers_peer`."""
    for name in ("transformers", "torch"):
        if importlib.util.find_spec(name) is None:
            absent(f"{name} is not installed", "install it with `make peers`", required_by="APRJAX_REQUIRE_PEERS")
    import transformers

    return transformers


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The first GPU that JAX sees. Mark such tests `gpu`."""
    import jax

    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        absent("JAX sees no GPU", "install jax[cuda12] on a machine that has one", required_by="APRJAX_REQUIRE_GPU")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium. Mark such tests `chromium`."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = os.environ.get("APRJAX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        fix = "install one (`apt-get install chromium`) or name it in APRJAX_CHROMIUM"
        absent("no Chromium or Chrome is installed", fix, required_by="APRJAX_REQUIRE_BROWSER")
        raise AssertionError  # unreachable: `absent` skips or fails
    started = Browser(executable, tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()
