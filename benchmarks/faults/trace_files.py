"""Traces of the NumPy engine as files: saved traces and APRT folders, written without `aprjax.trace`."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from engine import Values
from safetensors.numpy import save_file

_POINTS = {
    "qkv_matmul": "before the bias",
    "qkv_bias": "after the bias",
    "q_post_rope": "before the KV heads are repeated",
    "k_post_rope": "before the KV heads are repeated",
    "attn_scores": "scaled, before the mask",
    "attn_softmax": "after the mask",
}


def save_trace(path: Path, values: Values, *, model: Path, sha256: str, tokens: Sequence[int]) -> Path:
    """A saved trace (`aprjax.trace/1`), as of a float32 engine."""
    everyone = list(range(len(tokens)))
    info = {
        "path": str(model),
        "sha256": sha256,
        "format": "gguf",
        "arithmetic": "float32",
        "tokens": [int(token) for token in tokens],
        "positions": everyone,
        "head_positions": everyone,
        "dtype": "float32",
        "platform": "NumPy",
        "engine": {"name": "the fault bench's engine"},
    }
    named = {
        f"whole/{stage}" if layer < 0 else f"layer.{layer}/{stage}": np.ascontiguousarray(value, np.float32)
        for (layer, stage), value in values.items()
    }
    metadata = {"schema": "aprjax.trace/1", "info": json.dumps(info), "capture_points": json.dumps(_POINTS)}
    save_file(named, path, metadata)
    return path


def save_folder(folder: Path, values: Values) -> Path:
    """An APRT folder without a sidecar, as `apr trace --save-tensor` leaves it: the head of the last token alone."""
    for (layer, stage), value in values.items():
        target = folder / (f"{stage}.bin" if layer < 0 else f"layer-{layer}/{stage}.bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = value[-1:] if stage == "lm_head" else value
        numbers = np.ascontiguousarray(kept, "<f4")
        head = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer < 0 else layer, numbers.size)
        target.write_bytes(head + numbers.tobytes())
    return folder
