"""Runs llama.cpp once, in a process of its own. Started by `aprjax.trace.llama_cpp`, never imported by it.

`llama_cpp_generate_child`, the other such process, takes from here how the engine is loaded and driven.

A failed assertion inside ggml ends the process, its environment variables are read when the library
loads, and it talks on stdout and stderr: none of that may reach the caller. Protocol: a JSON object on
stdin; a trace in the file it names; nothing on stdout; the reason of a failure in the last line on stderr.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.qwen2.stages import Stage
from aprjax.trace.ggml_nodes import (
    KNOWN_PYTHON_PACKAGE,
    EngineMismatch,
    StageMap,
    absent_stages,
    check_library,
    declare,
    labels,
    missing_stages,
    read_node,
    read_values,
)
from aprjax.trace.trace import TraceInfo, TraceWriter

# enum ggml_log_level: what is below a warning is chatter.
_WARNING = 3
_KV_TYPES = {"f32": 0, "f16": 1}  # enum ggml_type
_CELLS = 256  # llama.cpp pads the number of cells that attention sees to this
# Callbacks that C holds on to: Python would free them.
_KEPT_ALIVE: list[Any] = []


def main() -> int:
    """Runs what stdin asks for; the exit code is 0 when the trace is complete."""
    return serve(_run)


def serve(run: Callable[[dict[str, Any]], None]) -> int:
    """Runs what stdin asks for; the exit code is 0 when it was done."""
    # Whatever the library prints must not look like an answer.
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    # Read by ggml when its library is loaded. Backtraces would start a debugger.
    os.environ["GGML_CPU_TILED_MM"] = "1" if request["options"]["tiled"] else "0"
    os.environ["GGML_NO_BACKTRACE"] = "1"
    try:
        run(request)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


def load_engine() -> tuple[Any, Any, dict[str, str]]:
    """The module `llama_cpp`, the base library, and what identifies the engine.

    Raises:
        EngineMismatch: another version is installed than the one whose structs and graph are known.
    """
    import llama_cpp

    if llama_cpp.__version__ != KNOWN_PYTHON_PACKAGE:
        raise EngineMismatch(f"expected llama-cpp-python {KNOWN_PYTHON_PACKAGE}, found {llama_cpp.__version__}")
    folder = Path(llama_cpp.llama_cpp._base_path)
    base = _load(folder, "ggml-base")
    declare(base)
    check_library(base)
    log = llama_cpp.llama_log_callback(_log)
    _KEPT_ALIVE.append(log)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    return llama_cpp, base, _facts(llama_cpp, base, folder)


def _run(request: dict[str, Any]) -> None:
    llama_cpp, base, facts = load_engine()
    if "facts" in request:
        Path(request["facts"]).write_text(json.dumps(facts))
        return
    info = TraceInfo(**request["info"])
    info = TraceInfo(**{**request["info"], "engine": {**info.engine, **facts}})
    layers, options = request["layers"], request["options"]
    total = len(info.tokens)
    step = options["step"] or total
    absent = absent_stages(flash_attention=options["flash_attention"], stepwise=step < total)
    kept = frozenset(Stage if request.get("stages") is None else map(Stage, request["stages"]))
    written: set[tuple[int, Stage]] = set()
    # Every node may be asked for, 40 in a layer (kernels.md section 4); a name takes the room of a stage's entry.
    spare = 64 * (layers + 1) * -(-total // step) if request["raw"] else 0
    with TraceWriter(Path(request["target"]), info, layers=layers, extra=spare) as writer:

        def emit(layer: int, stage: Stage, values: np.ndarray) -> None:
            if stage in absent:
                return
            written.add((layer, stage))
            if stage not in kept:
                return
            if stage is Stage.ATTN_SOFTMAX and step < total:
                values = _with_later_keys(values, capture.stages.keys, total)
            writer.write(layer, stage, values, total_rows=total)

        capture = _Capture(base, tuple(request["raw"]), writer)
        callback = llama_cpp.ggml_backend_sched_eval_callback(capture)
        with engine_context(llama_cpp, Path(info.path), options, count=total, step=step, callback=callback) as (
            _,
            context,
        ):
            for start in range(0, total, step):
                tokens = list(info.tokens[start : start + step])
                capture.stages = StageMap(len(tokens), start + len(tokens), emit)
                code = decode(llama_cpp, context, tokens, start)
                if capture.failure is not None:
                    raise capture.failure
                if code != 0:
                    raise RuntimeError(f"llama_decode failed with code {code}")
        missing = list(missing_stages(layers, written, absent=absent))
        if missing:
            raise EngineMismatch(f"{len(missing)} stages are not in the engine's graph, first {missing[0]}")


def _with_later_keys(rows: np.ndarray, keys: int, total: int) -> np.ndarray:
    """Probabilities `[position, head * keys]` with those of later keys, which are zero: `[position, head * total]`."""
    heads = rows.reshape(rows.shape[0], -1, keys)
    return np.pad(heads, ((0, 0), (0, 0), (0, total - keys))).reshape(rows.shape[0], -1)


def _log(level: int, text: bytes, _user: Any) -> None:
    if level >= _WARNING:
        sys.stderr.write(text.decode("utf-8", "replace"))


def _load(folder: Path, stem: str) -> ctypes.CDLL:
    for name in (f"lib{stem}.so", f"lib{stem}.dylib", f"{stem}.dll", f"lib{stem}.dll"):
        if (folder / name).is_file():
            return ctypes.CDLL(str(folder / name))
    raise EngineMismatch(f"no {stem} library lies beside llama.cpp's in {folder}")


def _facts(llama_cpp: Any, base: Any, folder: Path) -> dict[str, str]:
    """What identifies the engine: versions, features, and the digest of the library that computes."""
    kernels = next(iter(sorted(folder.glob("*ggml-cpu*"))), None)
    return {
        "name": "llama.cpp",
        "llama_cpp_python": llama_cpp.__version__,
        "ggml_version": base.ggml_version().decode(),
        "ggml_commit": base.ggml_commit().decode(),
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        "ggml_cpu_sha256": hashlib.sha256(kernels.read_bytes()).hexdigest() if kernels else "",
        "GGML_CPU_TILED_MM": os.environ["GGML_CPU_TILED_MM"],
    }


@contextmanager
def engine_context(
    llama_cpp: Any, path: Path, options: dict[str, Any], *, count: int, step: int, callback: Any = None
) -> Iterator[tuple[Any, Any]]:
    """A model and its context for `count` tokens in batches of `step`, freed at the end.

    `callback` is the scheduler's evaluation callback, if nodes are to be seen.
    """
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers = 0
    wanted.use_extra_bufts = options["repack"]
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), wanted)
    if not model:
        raise RuntimeError("llama.cpp cannot load the file")
    try:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-count // _CELLS) * _CELLS
        # A batch longer than these would be cut into several graphs.
        settings.n_batch = settings.n_ubatch = step
        # A build for GPUs would take large products and the cache there even with no layer on it.
        settings.offload_kqv = settings.op_offload = False
        settings.n_threads = settings.n_threads_batch = options["threads"]
        settings.type_k, settings.type_v = _KV_TYPES[options["type_k"]], _KV_TYPES[options["type_v"]]
        settings.flash_attn_type = int(options["flash_attention"])
        if callback is not None:
            settings.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, settings)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context with these options")
        try:
            yield model, context
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
        llama_cpp.llama_backend_free()


class _Capture:
    """The evaluation callback: copies wanted nodes while the engine computes them.

    Attributes:
        stages: of the batch at hand.
        failure: what went wrong in it. An exception must not cross into C: it stops the graph instead.
    """

    stages: StageMap

    def __init__(self, base: Any, raw: tuple[str, ...], writer: TraceWriter) -> None:
        self._base, self._raw, self._writer = base, raw, writer
        self._label = labels()
        self.failure: Exception | None = None

    def __call__(self, address: int, ask: bool, _user: Any) -> bool:
        """Asked before a node is computed: is it wanted? Told after: take it, and go on."""
        try:
            node = read_node(self._base, address)
            for_raw, for_stage = _is_raw(node.name, node.op, self._raw), self.stages.wants(node)
            if ask:
                return for_raw or for_stage
            values = read_values(self._base, node)
            if for_stage:
                self.stages.take(node, values)
            if for_raw:
                self._writer.write_extra(self._label(node), values)
        except Exception as error:
            self.failure = error
            return False
        return True


def decode(llama_cpp: Any, context: Any, tokens: list[int], start: int, *, first_output: int = 0) -> int:
    """One forward pass over a batch from position `start`; llama.cpp's return code.

    The tokens from `first_output` on are outputs. A trace needs all: otherwise the last layer sees the output
    rows only.
    """
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, start + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = row >= first_output
        return llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)


# Nodes that compute nothing: they show another node's values under another shape.
_VIEWS = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "SET_ROWS"})


def _is_raw(name: str, op: str, wanted: tuple[str, ...]) -> bool:
    return op not in _VIEWS and ("*" in wanted or name in wanted)


if __name__ == "__main__":
    sys.exit(main())
