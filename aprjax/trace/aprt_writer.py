"""Writing traces as APRT folders, with the sidecar and the provenance that the format itself lacks."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from aprjax import __version__
from aprjax.checkpoint.atomic import atomic_folder
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.aprt import ATTENTION_MAPS, HEAD_STAGES, HEADER, MAGIC, SCHEMA, SIDECAR, header_layer
from aprjax.trace.memory import AnyTrace
from aprjax.trace.provenance import NAME, Provenance, one_line
from aprjax.trace.trace import CAPTURE_POINTS

# An APRT header counts elements in 32 bits.
_MOST_ELEMENTS = 0xFFFFFFFF


def write_aprt(trace: AnyTrace, folder: str | Path) -> tuple[str, ...]:
    """Writes a trace as an APRT folder with sidecar and provenance; the folder appears when it is complete.

    `lm_head` holds the last token's logits only, as upstream's does.

    Returns:
        What was left out, one sentence each.

    Raises:
        CheckpointError: the folder is not empty or cannot be written, or a value is too large for the format.
    """
    info = trace.info
    notes = ["the engine's own nodes have no place in the format"] if len(trace.extra) else []
    files = []
    with atomic_folder(folder) as partial:
        for layer, stage in trace:
            values = trace[layer, stage]
            positions = info.head_positions if stage in HEAD_STAGES else info.positions
            if stage is Stage.LM_HEAD:
                if positions[-1:] != (len(info.tokens) - 1,):
                    notes.append("lm_head is left out: the format holds the last token's logits, and they are not here")
                    continue
                values, positions = values[-1:], positions[-1:]
            name = file_name(layer, stage)
            target = partial / name
            target.parent.mkdir(exist_ok=True)
            heads = _heads(stage, values, len(info.tokens))
            digest = write_values(target, header_layer(name), by_head(values, heads))
            files.append(
                {
                    "file": name,
                    "layer": layer,
                    "stage": str(stage),
                    "shape": list(values.shape),
                    "positions": list(positions),
                    "sha256": digest,
                    **({} if heads is None else {"heads": heads}),
                }
            )
        document = {"schema": SCHEMA, "info": asdict(info), "capture_points": CAPTURE_POINTS, "files": files}
        (partial / SIDECAR).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (partial / NAME).write_text(_describe(trace).text(), encoding="utf-8")
    return tuple(notes)


def file_name(layer: int, stage: Stage) -> str:
    """Where upstream puts a value: the embedding among layer 0's stages, final_norm and lm_head beside the layers."""
    if stage is Stage.EMBEDDING:
        return f"layer-0/{stage}.bin"
    return f"{stage}.bin" if layer == OUTSIDE else f"layer-{layer}/{stage}.bin"


def by_head(values: np.ndarray, heads: int | None) -> np.ndarray:
    """Values `[position, width]` as they lie in a file: head after head where there are any."""
    if heads is None:
        return values
    return values.reshape(values.shape[0], heads, -1).transpose(1, 0, 2)


def _heads(stage: Stage, values: np.ndarray, tokens: int) -> int | None:
    """How many heads a stage's values have that upstream writes head by head; None where it writes none so."""
    width = values.shape[1]
    return width // tokens if stage in ATTENTION_MAPS and width and width % tokens == 0 else None


def write_values(target: Path, layer: int, values: np.ndarray) -> str:
    """Writes a stage's file with this layer in its header, and returns its SHA-256.

    Raises:
        CheckpointError: there are more values than the header can count.
    """
    if values.size >= _MOST_ELEMENTS:
        raise CheckpointError(
            f"{values.size} elements are more than an APRT file can count",
            file=target.name,
            fix="trace a shorter prompt, or save as .safetensors",
        )
    header = HEADER.pack(MAGIC, layer, values.size)
    body = np.ascontiguousarray(values, "<f4")
    digest = hashlib.sha256(header)
    digest.update(body.data)
    with target.open("wb") as stream:
        stream.write(header)
        stream.write(body.data)
    return digest.hexdigest()


def _describe(trace: AnyTrace) -> Provenance:
    """Upstream's entries, as far as a trace knows them, then ours; an earlier provenance is kept below."""
    info = trace.info
    layers = sorted({layer for layer, _ in trace if layer != OUTSIDE})
    stages = [str(stage) for stage in Stage if any(key == (layer, stage) for layer in layers[:1] for key in trace)]
    entries = {
        "model": info.path,
        "tokens": list(info.tokens),
        "dtype": info.dtype,
        "layers_captured": layers,
        "stages_per_layer": stages,
        "stages_whole_model": f"[{', '.join(str(stage) for stage in HEAD_STAGES if (OUTSIDE, stage) in set(trace))}]",
    }
    if (OUTSIDE, Stage.LM_HEAD) in set(trace):
        logits = trace[OUTSIDE, Stage.LM_HEAD]
        entries |= {"vocab_size": logits.shape[1], "argmax_token": int(logits[-1].argmax())}
    entries |= {
        "generated_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": f"aprjax {__version__}",
        "model_sha256": info.sha256,
        "arithmetic": info.arithmetic,
        "platform": info.platform,
        **{re.sub(r"\W", "_", key): value for key, value in info.engine.items() if key != "provenance"},
    }
    earlier = info.engine.get("provenance")
    rest = f"\nprovenance of what this was made from:\n{earlier}" if earlier else ""
    return Provenance("aprjax stages", {key: one_line(value) for key, value in entries.items()}, rest)
