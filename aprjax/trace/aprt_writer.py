"""Writing traces as APRT folders, with the sidecar and the provenance that the format itself lacks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from aprjax.checkpoint.atomic import atomic_folder
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.aprt import HEAD_STAGES, HEADER, MAGIC, PROVENANCE, SCHEMA, SIDECAR, WHOLE_MODEL
from aprjax.trace.memory import AnyTrace
from aprjax.trace.trace import CAPTURE_POINTS


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
            name = f"{stage}.bin" if layer == OUTSIDE else f"layer-{layer}/{stage}.bin"
            target = partial / name
            target.parent.mkdir(exist_ok=True)
            digest = _write_values(target, layer, values)
            files.append(
                {
                    "file": name,
                    "layer": layer,
                    "stage": str(stage),
                    "shape": list(values.shape),
                    "positions": list(positions),
                    "sha256": digest,
                }
            )
        document = {"schema": SCHEMA, "info": asdict(info), "capture_points": CAPTURE_POINTS, "files": files}
        (partial / SIDECAR).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (partial / PROVENANCE).write_text(_describe(trace), encoding="utf-8")
    return tuple(notes)


def _write_values(target: Path, layer: int, values: np.ndarray) -> str:
    if values.size >= WHOLE_MODEL:
        raise CheckpointError(
            f"{values.size} elements are more than an APRT file can count",
            file=target.name,
            fix="trace a shorter prompt, or save as .safetensors",
        )
    header = HEADER.pack(MAGIC, WHOLE_MODEL if layer == OUTSIDE else layer, values.size)
    body = np.ascontiguousarray(values, "<f4")
    digest = hashlib.sha256(header)
    digest.update(body.data)
    with target.open("wb") as stream:
        stream.write(header)
        stream.write(body.data)
    return digest.hexdigest()


def _describe(trace: AnyTrace) -> str:
    """What a person reads about the folder; an earlier provenance is kept below."""
    info = trace.info
    engine = {key: value for key, value in info.engine.items() if key != "provenance"}
    lines = {
        "written by": f"aprjax {_version()}",
        "model": info.path,
        "model sha256": info.sha256,
        "arithmetic": info.arithmetic,
        "dtype": info.dtype,
        "platform": info.platform,
        "tokens": ",".join(str(token) for token in info.tokens),
        "layers": len({layer for layer, _ in trace if layer != OUTSIDE}),
        **engine,
    }
    if (OUTSIDE, Stage.LM_HEAD) in set(trace):
        logits = trace[OUTSIDE, Stage.LM_HEAD]
        lines |= {"vocabulary": logits.shape[1], "argmax of the last row": int(logits[-1].argmax())}
    lines["written at (UTC)"] = datetime.now(UTC).isoformat(timespec="seconds")
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    earlier = info.engine.get("provenance")
    return text + (f"\nprovenance of what this was made from:\n{earlier}" if earlier else "")


def _version() -> str:
    try:
        return metadata.version("aprjax")
    except metadata.PackageNotFoundError:  # run from a working tree
        return "(not installed)"
