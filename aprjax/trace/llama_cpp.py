"""llama.cpp run live: every stage that its CPU graph computes, from the installed llama-cpp-python.

The engine runs in a child process (`llama_cpp_child`), which is gone afterwards with all its memory.
Two things about the mapping (docs/architecture.md): ggml's SwiGLU is one kernel, so `ffn_silu` is never
there; with flash attention there are no scores and probabilities either, and stepwise no scores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from aprjax.checkpoint.open import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.stages import Stage
from aprjax.trace.engine import EngineError, check_tokens
from aprjax.trace.memory import MemoryTrace
from aprjax.trace.trace import Trace, TraceInfo

ARITHMETIC = "llama.cpp (live)"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LlamaOptions:
    """How llama.cpp is to run. The defaults are the oracle for exactness (kernels.md section 3.4).

    Attributes:
        type_k: what keys are cached as. float32 is effective only without flash attention.
        type_v: what values are cached as.
        flash_attention: whether attention is one fused kernel.
        threads: number of threads; None takes the machine's.
        tiled: lets ggml multiply K-quants in tiles from 8 tokens on, which sums in another order.
        repack: lets a build that has it re-lay weights for its matrix kernels.
        step: tokens per batch; None feeds all at once. 1 is how text is generated.
        library: folder of other shared libraries of the same version (`LLAMA_CPP_LIB_PATH`).
    """

    type_k: Literal["f32", "f16"] = "f32"
    type_v: Literal["f32", "f16"] = "f32"
    flash_attention: bool = False
    threads: int | None = None
    tiled: bool = False
    repack: bool = False
    step: int | None = None
    library: str | None = None


def run_llama_cpp(
    path: str | Path,
    tokens: list[int],
    options: LlamaOptions | None = None,
    *,
    raw: tuple[str, ...] = (),
) -> MemoryTrace:
    """Runs a GGUF file in llama.cpp and returns every stage of every token, in memory.

    Args:
        path: a GGUF file of the architecture qwen2.
        tokens: token ids, fed from position 0.
        options: how the engine is to run.
        raw: names of ggml nodes to keep as they are, too (`kq`, `norm`, `Vcur`; `*` is all that are
            computed). They are in the trace's `extra` as `kq-3:MUL_MAT`, axes in row-major order,
            keys padded as the engine pads them.

    Raises:
        EngineError: llama-cpp-python is absent, of another version or layout, or failed.
        CheckpointError: the file cannot be read, or has no such tokens.
    """
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        saved = save_llama_cpp(path, tokens, Path(folder) / "trace.safetensors", options, raw=raw)
        return MemoryTrace.load(saved)


def save_llama_cpp(
    path: str | Path,
    tokens: list[int],
    target: Path,
    options: LlamaOptions | None = None,
    *,
    raw: tuple[str, ...] = (),
    stages: tuple[Stage, ...] | None = None,
) -> Trace:
    """The same as `run_llama_cpp`, streamed to a file: one node at a time is in memory.

    `stages` are those that are kept, by default all.
    """
    options = options or LlamaOptions()
    checkpoint = open_checkpoint(path)
    require_llama_file(checkpoint)
    check_tokens(checkpoint, tokens)
    everyone = tuple(range(len(tokens)))
    threads = options.threads or processors()
    engine = {key: str(value) for key, value in asdict(options).items() if value is not None}
    info = TraceInfo(
        path=str(path),
        sha256=checkpoint.sha256(),
        format=checkpoint.format,
        arithmetic=ARITHMETIC,
        tokens=tuple(tokens),
        positions=everyone,
        head_positions=everyone,
        platform=f"{platform.machine()} cpu",
        engine={**engine, "threads": str(threads)},
    )
    request = {
        "info": asdict(info),
        "target": str(target),
        "layers": checkpoint.config.num_layers,
        "options": {**asdict(options), "threads": threads},
        "raw": list(raw),
        "stages": None if stages is None else [str(stage) for stage in stages],
    }
    start_child("llama_cpp_child", request, options, path)
    return Trace.load(target)


@cache
def engine_facts(options: LlamaOptions) -> dict[str, str]:
    """What a trace would record of the engine itself: versions, the build's features, the library's digest.

    Raises:
        EngineError: llama-cpp-python is absent, of another version or layout, or failed.
    """
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        target = Path(folder) / "facts.json"
        request: dict[str, object] = {"facts": str(target), "options": {"tiled": options.tiled}}
        start_child("llama_cpp_child", request, options)
        return json.loads(target.read_text())


def require_llama_file(checkpoint: Checkpoint) -> None:
    """Checks that llama.cpp can run the file.

    Raises:
        EngineError: it is no GGUF file of a Qwen2.
    """
    config = checkpoint.config
    if checkpoint.format != "gguf" or config.architecture != "qwen2":
        raise EngineError(
            f"expected a GGUF file of the architecture qwen2, found {checkpoint.format} of {config.architecture!r}",
            file=checkpoint.path,
            fix="convert it first: `python -m aprjax convert IN OUT.gguf`",
        )


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_child(module: str, request: dict[str, object], options: LlamaOptions, path: str | Path | None = None) -> None:
    """Runs `aprjax.trace.{module}` in a process of its own, with the request as JSON on its stdin.

    Raises:
        EngineError: llama-cpp-python is absent, of another version or layout, or failed.
    """
    import importlib.util

    if importlib.util.find_spec("llama_cpp") is None:
        raise EngineError("llama-cpp-python is not installed", file=path, fix="install it with `make peers`")
    environment = dict(os.environ)
    if options.library is not None:
        environment["LLAMA_CPP_LIB_PATH"] = options.library
    # The child finds what this process would import, wherever it runs.
    environment["PYTHONPATH"] = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, sys.path)])
    try:
        finished = subprocess.run(
            # Without the current folder on the path: a file there could stand in for a module.
            [sys.executable, "-P", "-m", f"aprjax.trace.{module}"],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=environment,
            check=False,
        )
    except OSError as error:  # no interpreter to start, as in a Python embedded in another program
        raise EngineError(f"llama.cpp cannot be started: {error}", file=path) from None
    if finished.returncode == 0:
        return
    said = finished.stderr.decode("utf-8", "replace").strip().splitlines()
    last = said[-1][:500] if said else "it said nothing"
    how = f"ended by signal {-finished.returncode}" if finished.returncode < 0 else "failed"
    fix = "install the build that the tests use: `make peers`" if last.startswith("EngineMismatch") else None
    raise EngineError(f"llama.cpp {how}: {last}", file=path, fix=fix or "the last lines it wrote say why")
