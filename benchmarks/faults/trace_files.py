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


def save_folder(folder: Path, values: Values, heads: int) -> Path:
    """An APRT folder without a sidecar, as upstream leaves it.

    The embedding lies among the stages of layer 0, attention maps lie head by head, and of the head there is the last
    token alone.
    """
    for (layer, stage), value in values.items():
        place = 0 if stage == "embedding" else layer
        target = folder / (f"{stage}.bin" if place < 0 else f"layer-{place}/{stage}.bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = value[-1:] if stage == "lm_head" else value
        if stage in ("attn_scores", "attn_softmax"):
            kept = kept.reshape(len(kept), heads, -1).transpose(1, 0, 2)
        numbers = np.ascontiguousarray(kept, "<f4")
        head = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if place < 0 else place, numbers.size)
        target.write_bytes(head + numbers.tobytes())
    return folder
