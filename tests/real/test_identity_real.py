"""The story of upstream's layer 3 on a real model: `identify` says it from the folder alone, and has its ratio."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aprjax.bisect.explain.identity import identify
from aprjax.checkpoint import open_checkpoint
from aprjax.qwen2 import PRESETS, Stage
from aprjax.trace.sides import run_checkpoint

pytestmark = pytest.mark.real_model
# "What is 2+2?", upstream's prompt (contracts.md 2.1).
TOKENS = (3838, 374, 220, 17, 10, 17, 30)


def dump(folder: Path, layer: int, stage: str, value: np.ndarray) -> None:
    """A file as `apr trace --save-tensor` writes it."""
    target = folder / (f"{stage}.bin" if layer < 0 else f"layer-{layer}/{stage}.bin")
    target.parent.mkdir(parents=True, exist_ok=True)
    body = np.ascontiguousarray(value, "<f4").tobytes()
    target.write_bytes(b"APRT" + struct.pack("<II", 0xFFFFFFFF if layer < 0 else layer, len(body) // 4) + body)


def test_the_ratio_of_upstream_is_one_of_token_sets(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model_path("qwen2.5-coder-0.5b"))
    # As llama.cpp computes; `identify` runs the folder's file in float32, as nothing is known of it.
    trace = run_checkpoint(checkpoint, list(TOKENS), PRESETS["llama.cpp"])
    for (layer, stage), value in trace.values.items():
        if layer > 4 or stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX, Stage.FINAL_NORM, Stage.LM_HEAD):
            continue
        if stage is Stage.QKV_BIAS:
            dump(tmp_path, layer, stage, trace[layer, Stage.QKV_MATMUL])
        elif stage in (Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SWIGL):
            dump(tmp_path, layer, stage, value[-1:])
        else:
            dump(tmp_path, layer, stage, value)
    found = {finding.id: finding for finding in identify(tmp_path, checkpoint, tokens=TOKENS)}
    assert set(found) == {"capture-point", "token-selection"}
    assert found["capture-point"].stages == (Stage.QKV_BIAS,)
    assert found["capture-point"].layers == (0, 1, 2, 3, 4)
    selection = found["token-selection"]
    assert selection.stages == (Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SWIGL)
    told = selection.evidence["standard_deviation"]
    value = trace[told["layer"], Stage(told["stage"])].astype(np.float64)
    assert told["ratio"] == pytest.approx(value.std(ddof=1) / value[-1].std(ddof=1), rel=0.1)
    # One run, and its own numbers are several times apart when other tokens are compared.
    assert told["ratio"] > 3
    # Without tokens the embedding says them.
    (tokens,) = (f for f in identify(tmp_path, checkpoint) if f.id == "tokens-recovered")
    assert tokens.evidence["run"] == list(TOKENS)
    assert tokens.evidence["text"] == "What is 2+2?"
