"""The interface of upstream's oracle script, `generate_qwen25_coder_fp16_stages.py` (contracts.md section 2.4).

The same arguments, files, bytes and `_PROVENANCE.txt`, so that `apr diff --values APR.bin ORACLE.bin` takes our folder
for theirs. What computes is aprjax, in any of its arithmetics, on any checkpoint; or transformers, where a 16-bit dtype
is asked for, as there. Queries and keys after the rotation lie head by head, as the script's do and `apr trace`'s do
not: comparing these two element by element compares other elements.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aprjax.checkpoint.atomic import atomic_folder
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.aprt import ATTENTION_MAPS, HEAD_STAGES, SCHEMA, SIDECAR, header_layer
from aprjax.trace.aprt_writer import by_head, file_name, write_values
from aprjax.trace.commit import source_commit
from aprjax.trace.memory import AnyTrace
from aprjax.trace.provenance import NAME, Provenance, one_line
from aprjax.trace.sides import open_side
from aprjax.trace.trace import CAPTURE_POINTS

# Upstream's defaults.
DEFAULT_MODEL = "Qwen/Qwen2.5-Coder-7B-Instruct"
DEFAULT_PROMPT = "What is 2+2?"
DTYPES = ("float16", "bfloat16", "float32")
# In the order in which the script lists them; it leaves post_attn_residual out, and nobody is hurt by one file more.
_BASE = (
    Stage.ATTN_NORM,
    Stage.QKV_MATMUL,
    Stage.QKV_BIAS,
    Stage.ATTENTION,
    Stage.ATTN_OUT,
    Stage.POST_ATTN_RESIDUAL,
    Stage.POST_FFN_RESIDUAL,
    Stage.FFN_NORM,
    Stage.FFN_GATE,
    Stage.FFN_UP,
    Stage.FFN_SILU,
    Stage.FFN_SWIGL,
    Stage.FFN_OUT,
)
SUBSTAGES = (Stage.Q_POST_ROPE, Stage.K_POST_ROPE, *ATTENTION_MAPS)


@dataclass(frozen=True)
class Oracle:
    """What an oracle run came to.

    Attributes:
        folder: where the stages are.
        files: their paths in it and sizes in bytes, in upstream's order.
        tokens: what was fed.
        vocabulary: how many logits there are.
        argmax: the likeliest next token.
        argmax_text: its text.
        absent: stages that the engine does not yield: not written, not measured.
    """

    folder: Path
    files: tuple[tuple[str, int], ...]
    tokens: tuple[int, ...]
    vocabulary: int
    argmax: int
    argmax_text: str
    absent: tuple[str, ...]


def find_model(text: str) -> str:
    """A side's text as it is; a name on the Hub becomes the folder of its snapshot in the Hub's cache.

    Raises:
        CheckpointError: the name is in no cache. Nothing is downloaded.
    """
    if (
        re.match(r"(llama\.cpp(\[.*\])?|hf):", text)
        or os.path.exists(text)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    ):
        return text
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{text.replace('/', '--')}"
    snapshots = sorted((cache / "snapshots").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not snapshots:
        raise CheckpointError(
            f"{text} is neither a file or folder nor in the Hub's cache",
            file=cache,
            fix="give a folder, a .gguf or an .apr file; nothing is downloaded here",
        )
    return str(snapshots[-1].parent)


def run_oracle(
    model: str,
    output: Path,
    *,
    prompt: str = DEFAULT_PROMPT,
    layers: Sequence[int] = (0,),
    dtype: str | None = None,
    device: str | None = None,
    arithmetic: str | None = None,
    substages: bool = True,
) -> Oracle:
    """Runs a model on a prompt, fed as it is, and writes the stages as upstream's script does.

    Args:
        model: a side's text, or a name in the Hub's cache.
        output: the folder, which must be new or empty.
        prompt: encoded without special tokens around it.
        layers: of which stages are written.
        dtype: float16 and bfloat16 run a Hugging Face folder by transformers; float32, or none, runs aprjax.
        device: `cpu` or `cuda`, of jax; by default the first that jax has.
        arithmetic: of aprjax; by default float32.
        substages: whether the four stages within the attention are written.

    Raises:
        CheckpointError: the model cannot be read or run so, a layer is none of its, or the folder cannot be written.
    """
    from aprjax.text.tokenizer import Tokenizer

    side = open_side(find_model(model))
    if side.checkpoint is None:
        raise CheckpointError("a recorded trace is no model", file=side.path, fix="`trace DIR --save` rewrites a trace")
    checkpoint = side.checkpoint
    wrong = [layer for layer in layers if not 0 <= layer < checkpoint.config.num_layers]
    if wrong or not layers:
        raise CheckpointError(
            f"expected layers from 0 to {checkpoint.config.num_layers - 1}, found {wrong or 'none'}",
            file=side.path,
            fix="give --layers 0,1,2",
        )
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokens = tokenizer.encode(prompt)
    if dtype in (None, "float32"):
        trace, run_on = _computed(side, tokens, arithmetic, device)
    else:
        trace, run_on = _by_transformers(checkpoint, tokens, str(dtype), device, arithmetic), "cpu"
    argmax = int(trace[OUTSIDE, Stage.LM_HEAD][-1].argmax())
    text = tokenizer.decode([argmax]) if argmax < len(tokenizer) else ""
    told = {"model": model, "prompt": repr(prompt), "tokens": list(trace.info.tokens), "device": run_on}
    asked = _Asked(told, (argmax, text), tuple(sorted(set(layers))), substages)
    return _write(trace, output, asked, checkpoint)


def _computed(side: Any, tokens: list[int], arithmetic: str | None, device: str | None) -> tuple[AnyTrace, str]:
    from aprjax.qwen2.arithmetic import preset

    if side.kind != "checkpoint":
        return side.trace(tokens), "cpu"
    import jax

    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(jax.default_device(_device(device)))
        trace = side.trace(tokens, arithmetic=preset(arithmetic or "float32"))
    return trace, device or jax.devices()[0].platform


def _device(name: str) -> Any:
    import jax

    try:
        return jax.devices(name)[0]
    except RuntimeError:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise CheckpointError(
            f"jax has no device {name!r}, only {found}", fix="leave --device out, or install aprjax[cuda]"
        ) from None


def _by_transformers(
    checkpoint: Checkpoint, tokens: list[int], dtype: str, device: str | None, arithmetic: str | None
) -> AnyTrace:
    from aprjax.trace.hf import run_transformers

    if checkpoint.format != "safetensors" or arithmetic is not None or device not in (None, "cpu"):
        raise CheckpointError(
            f"{dtype} is computed by transformers, on the CPU, from a Hugging Face folder; found "
            f"{checkpoint.format}, device {device or 'any'}, arithmetic {arithmetic or 'none'}",
            file=checkpoint.path,
            fix="leave --dtype out: aprjax computes any checkpoint, in float32 and on jax's device",
        )
    return run_transformers(checkpoint.path, tokens, dtype)


@dataclass(frozen=True)
class _Asked:
    """What was asked, and the likeliest next token with its text."""

    told: dict[str, Any]
    best: tuple[int, str]
    layers: tuple[int, ...]
    substages: bool


def _write(trace: AnyTrace, output: Path, asked: _Asked, checkpoint: Checkpoint) -> Oracle:
    present, layers, best = set(trace), asked.layers, asked.best
    wanted = [*_BASE, *(SUBSTAGES if asked.substages else ())]
    # The script's order: by layer, then by name, the whole model's last.
    keys = [(0, Stage.EMBEDDING), *((layer, stage) for layer in layers for stage in wanted)]
    keys = [*sorted(keys, key=lambda key: (key[0], str(key[1]))), *((OUTSIDE, stage) for stage in HEAD_STAGES)]
    read = [(OUTSIDE, stage) if stage is Stage.EMBEDDING else (layer, stage) for layer, stage in keys]
    absent = [f"{file_name(*key)}" for key in read if key not in present]
    config, entries, files = checkpoint.config, [], []
    with atomic_folder(output) as partial:
        for key in read:
            if key not in present:
                continue
            stage, values = key[1], trace[key]
            positions = trace.info.head_positions if stage in HEAD_STAGES else trace.info.positions
            if stage is Stage.LM_HEAD:
                values, positions = values[-1:], positions[-1:]
            heads = (
                {Stage.K_POST_ROPE: config.num_kv_heads}.get(stage, config.num_heads) if stage in SUBSTAGES else None
            )
            name = file_name(*key)
            (partial / name).parent.mkdir(exist_ok=True)
            digest = write_values(partial / name, header_layer(name), by_head(values, heads))
            files.append((name, (partial / name).stat().st_size))
            entry = {"file": name, "layer": key[0], "stage": str(stage), "shape": list(values.shape)}
            entries.append({**entry, "positions": list(positions), "sha256": digest})
            if heads is not None:
                entries[-1]["heads"] = heads
        info = replace(trace.info, engine={k: v for k, v in trace.info.engine.items() if k != "provenance"})
        sidecar = {"schema": SCHEMA, "info": asdict(info), "capture_points": CAPTURE_POINTS, "files": entries}
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
        text = _provenance(trace, asked, [str(stage) for stage in wanted if (layers[0], stage) in present])
        (partial / NAME).write_text(text.text(), encoding="utf-8")
    vocabulary = trace[OUTSIDE, Stage.LM_HEAD].shape[1]
    return Oracle(output, tuple(files), trace.info.tokens, vocabulary, *best, tuple(absent))


def _provenance(trace: AnyTrace, asked: _Asked, stages: list[str]) -> Provenance:
    """The script's entries in its order, then what computed and from which file."""
    from aprjax import __version__

    info, engine = trace.info, trace.info.engine
    entries = {
        "model": asked.told["model"],
        "prompt": asked.told["prompt"],
        "tokens": asked.told["tokens"],
        "dtype": f"torch.{engine['dtype']}" if engine.get("name") == "transformers" else info.dtype,
        "device": asked.told["device"],
        "layers_captured": list(asked.layers),
        "stages_per_layer": ["embedding", *stages],
        "stages_whole_model": f"[{', '.join(map(str, HEAD_STAGES))}]",
        "with_attn_substages": asked.substages,
        "vocab_size": trace[OUTSIDE, Stage.LM_HEAD].shape[1],
        "argmax_token": asked.best[0],
        "argmax_text": repr(asked.best[1]),
        "git_sha": source_commit()[0] or "(not in a repository)",
        "transformers_version": engine.get("transformers", "(not used)"),
        "torch_version": engine.get("torch", "(not used)"),
        "generated_utc": datetime.now(UTC).isoformat(),
        "written_by": f"aprjax {__version__}",
        "model_sha256": info.sha256,
        "arithmetic": info.arithmetic,
        "platform": info.platform,
    }
    title = f"SHIP-007 reference stages, computed by {engine.get('name', 'aprjax')} ({info.arithmetic})"
    # What Python has quoted keeps its spaces.
    quoted = ("prompt", "argmax_text")
    return Provenance(title, {key: str(v) if key in quoted else one_line(v) for key, v in entries.items()})
