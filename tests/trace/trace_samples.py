"""Small traces with every kind of value, for the tests of files."""

from __future__ import annotations

import numpy as np

from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace import AnyTrace, MemoryTrace, TraceInfo

# A NaN with a payload, infinities, both zeros, the smallest denormal and the largest number.
SPECIAL = np.array([0x7FC12345, 0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 1, 0x7F7FFFFF], np.uint32)
TOKENS = (3, 1, 4, 1, 5)
WIDTHS = {Stage.EMBEDDING: 8, Stage.FINAL_NORM: 8, Stage.LM_HEAD: 11, Stage.ATTN_SCORES: 10, Stage.ATTN_SOFTMAX: 10}


def sample(
    *, layers: int = 2, positions: tuple[int, ...] = (0, 1, 2, 3, 4), heads: tuple[int, ...] = (0, 1, 2, 3, 4)
) -> MemoryTrace:
    """Random values, special ones among them, and two raw nodes."""
    generator = np.random.default_rng(7)
    keys = [(OUTSIDE, Stage.EMBEDDING)]
    keys += [(layer, stage) for layer in range(layers) for stage in LAYER_STAGES]
    keys += [(OUTSIDE, Stage.FINAL_NORM), (OUTSIDE, Stage.LM_HEAD)]
    values = {}
    for layer, stage in keys:
        rows = len(heads if stage in (Stage.FINAL_NORM, Stage.LM_HEAD) else positions)
        value = generator.normal(size=(rows, WIDTHS.get(stage, 8))).astype(np.float32)
        value.reshape(-1)[: SPECIAL.size] = SPECIAL.view(np.float32)
        values[layer, stage] = value
    info = TraceInfo(
        path="model.gguf",
        sha256="0" * 64,
        format="gguf",
        arithmetic="llama.cpp",
        tokens=TOKENS,
        positions=positions,
        head_positions=heads,
        platform="here",
        engine={"name": "an engine", "threads": "2"},
    )
    extra = {"kq-0:MUL_MAT": generator.normal(size=(1, 2, 5, 256)).astype(np.float32), "norm:RMS_NORM#2": SPECIAL}
    return MemoryTrace(info, values, {name: value.view(np.float32) for name, value in extra.items()})


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equality of shape and of every bit: NaN equals itself, the zeros differ."""
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def assert_same_values(ours: AnyTrace, theirs: AnyTrace) -> None:
    """The same keys in the same order, and the same bits."""
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    for key in theirs:
        assert same_bits(ours[key], theirs[key]), key
