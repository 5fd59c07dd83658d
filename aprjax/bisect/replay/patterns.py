"""What a wrong value looks like, in words: where it is wrong, and how it follows from the right one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aprjax.checkpoint.types import EncodedTensor, ModelConfig
from aprjax.qwen2.stages import Stage

# An element counts as wrong when it is off by more than this many tolerances of its position's root mean
# square: rounding spreads over all elements, and of normal errors none in 10^4 exceeds four deviations.
_ELEMENT = 4.0
# A pattern is named when it leaves at most this share of the difference unexplained. A lane dropped from a
# product with quantized activations is off by the quantization, about 1/127 of it.
_LEFT_OVER = 0.05
# Rows that a hypothesis about the weights is tried on.
_ROWS = 4


def describe_fault(
    stage: Stage,
    value: np.ndarray,
    expected: np.ndarray,
    *,
    tolerance: float,
    config: ModelConfig,
    positions: Sequence[int],
    inputs: np.ndarray | None = None,
    weights: Sequence[EncodedTensor] = (),
) -> str:
    """One sentence about a value that is not the expected one; both `[position, width]` and finite.

    `inputs` and `weights` are those of a matrix product; without them nothing is said of left-out columns.
    """
    rms = np.sqrt(np.mean(np.square(expected, dtype=np.float64), axis=1, keepdims=True))
    wrong = np.abs(value.astype(np.float64) - expected) > _ELEMENT * tolerance * rms
    if not wrong.any():
        wrong = value != expected
    where = _where(stage, wrong, config, positions)
    how = (
        _zeros_or_scale(value, expected, wrong, config)
        or _left_out(value, expected, inputs, weights)
        or _rearranged(stage, value, expected, wrong, config)
        or _sums(stage, value, wrong, config)
        or _size(value, expected, wrong)
    )
    return f"{where} {how}"


def _groups(stage: Stage, width: int, config: ModelConfig) -> list[tuple[str, slice]]:
    """The heads or projections that a stage's columns belong to."""
    if stage in (Stage.QKV_MATMUL, Stage.QKV_BIAS):
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return [("q", slice(0, q)), ("k", slice(q, q + kv)), ("v", slice(q + kv, width))]
    heads = {
        Stage.Q_POST_ROPE: config.num_heads,
        Stage.K_POST_ROPE: config.num_kv_heads,
        Stage.ATTN_SCORES: config.num_heads,
        Stage.ATTN_SOFTMAX: config.num_heads,
        Stage.ATTENTION: config.num_heads,
    }.get(stage)
    if heads is None:
        return []
    size = width // heads
    kind = "KV head" if stage is Stage.K_POST_ROPE else "head"
    return [(f"{kind} {head}", slice(head * size, (head + 1) * size)) for head in range(heads)]


def _where(stage: Stage, wrong: np.ndarray, config: ModelConfig, positions: Sequence[int]) -> str:
    rows, columns = np.flatnonzero(wrong.any(axis=1)), np.flatnonzero(wrong.any(axis=0))
    parts: list[str] = []
    groups = _groups(stage, wrong.shape[1], config)
    hit = [name for name, part in groups if wrong[:, part].any()]
    if groups and len(hit) < len(groups):
        parts.append(", ".join(hit[:4]) + (f" and {len(hit) - 4} more heads" if len(hit) > 4 else ""))
    lanes = _lanes(columns, wrong.shape[1])
    if lanes:
        parts.append(lanes)
    elif columns.size == 1:
        parts.append(f"channel {columns[0]}")
    elif columns.size < wrong.shape[1] and not parts and columns[-1] - columns[0] + 1 == columns.size:
        parts.append(f"channels {columns[0]} to {columns[-1]}")
    if rows.size < wrong.shape[0]:
        some = ", ".join(str(positions[r]) for r in rows[:4])
        parts.append(f"position{'s' if rows.size > 1 else ''} {some}{' …' if rows.size > 4 else ''}")
    share = f"{np.count_nonzero(wrong)} of {wrong.size} values"
    return f"in {'; '.join(parts)}, {share}" if parts else share


def _lanes(columns: np.ndarray, width: int) -> str:
    """Columns that are all those of one residue: what a lost vector lane or a wrong tile leaves behind."""
    for size in (2, 4, 8, 16, 32, 64):
        if width % size or columns.size != width // size or columns.size < 2:
            continue
        lane = int(columns[0])
        if lane < size and np.array_equal(columns, np.arange(lane, width, size)):
            return f"every channel that is {lane} modulo {size}"
    return ""


def _zeros_or_scale(value: np.ndarray, expected: np.ndarray, wrong: np.ndarray, config: ModelConfig) -> str:
    ours, theirs = value[wrong].astype(np.float64), expected[wrong].astype(np.float64)
    if not ours.any():
        return "are zero"
    norm = float(theirs @ theirs)
    if norm == 0:
        return ""
    factor = float(ours @ theirs) / norm
    if np.linalg.norm(ours - factor * theirs) > 1e-3 * np.linalg.norm(ours):
        return ""
    named = {config.head_dim**0.5: "the root of the head's width", config.head_dim**-0.5: "1 / root of the width"}
    name = next((f" ({text})" for known, text in named.items() if abs(factor / known - 1) < 1e-3), "")
    return f"are {factor:.6g} times what the file gives{name}"


def _left_out(
    value: np.ndarray, expected: np.ndarray, inputs: np.ndarray | None, weights: Sequence[EncodedTensor]
) -> str:
    """A product from which some columns are missing: a vector lane, or a block."""
    if inputs is None or not weights:
        return ""
    delta = expected.astype(np.float64) - value
    rows = np.argsort(-np.linalg.norm(delta, axis=1))[:_ROWS]
    begin = 0
    for tensor in weights:
        part = slice(begin, begin + tensor.shape[0])
        begin = part.stop
        missing = delta[rows, part]
        # The outputs that lost most tell most, and a few hundred of them are enough.
        outputs = np.sort(np.argsort(-np.linalg.norm(missing, axis=0))[:256])
        missing = missing[:, outputs]
        if not missing.any():
            continue
        try:
            matrix = tensor.decode_rows(outputs).astype(np.float64)
        except (ValueError, TypeError):
            return ""
        found = _columns_missing(missing, inputs[rows].astype(np.float64), matrix)
        if found:
            return f"lack {found} in every sum"
    return ""


def _columns_missing(missing: np.ndarray, x: np.ndarray, matrix: np.ndarray) -> str:
    columns = matrix.shape[1]
    norm = np.linalg.norm(missing)
    for size in (8, 16, 32, 4, 256):
        if columns % size:
            continue
        for kind in ("lane", "block"):
            if size == 256 and kind == "lane":
                continue
            shape = (-1, columns // size, size)
            terms = "rbl,obl->lro" if kind == "lane" else "rbl,obl->bro"
            partial = np.einsum(terms, x.reshape(shape), matrix.reshape(shape), optimize=True)
            left = np.linalg.norm(missing - partial, axis=(1, 2))
            best = int(left.argmin())
            if left[best] <= _LEFT_OVER * norm:
                return (
                    f"lane {best} of {size}" if kind == "lane" else f"columns {best * size} to {(best + 1) * size - 1}"
                )
    return ""


def _rearranged(stage: Stage, value: np.ndarray, expected: np.ndarray, wrong: np.ndarray, config: ModelConfig) -> str:
    """The right numbers at the wrong places: a transposed read."""
    rows = np.flatnonzero(wrong.any(axis=1))
    ours, theirs = value[rows], expected[rows]
    scale = np.abs(theirs).max()
    if np.allclose(np.sort(ours, axis=1), np.sort(theirs, axis=1), rtol=1e-5, atol=1e-6 * scale):
        heads = len(_groups(stage, value.shape[1], config))
        if heads > 1 and stage not in (Stage.QKV_MATMUL, Stage.QKV_BIAS):
            turned = theirs.reshape(rows.size, heads, -1).transpose(0, 2, 1).reshape(theirs.shape)
            if np.allclose(ours, turned, rtol=1e-5, atol=1e-6 * scale):
                return "are the file's, read as [channel, head] for [head, channel]"
        return "are the file's in another order"
    if np.allclose(np.sort(ours.ravel()), np.sort(theirs.ravel()), rtol=1e-5, atol=1e-6 * scale):
        return "are the file's at other positions"
    return ""


def _sums(stage: Stage, value: np.ndarray, wrong: np.ndarray, config: ModelConfig) -> str:
    """Probabilities that do not add up to one."""
    if stage is not Stage.ATTN_SOFTMAX:
        return ""
    rows = np.flatnonzero(wrong.any(axis=1))
    sums = value[rows].reshape(rows.size, config.num_heads, -1).sum(axis=-1, dtype=np.float64)
    worst = float(sums.flat[int(np.abs(sums - 1).argmax())])
    # float32 sums of a few hundred probabilities stay within some 1e-6 of one.
    if abs(worst - 1) < 1e-4:
        return ""
    return f"are no probabilities: they add up to {worst:.6g} for one key row"


def _size(value: np.ndarray, expected: np.ndarray, wrong: np.ndarray) -> str:
    ours, theirs = value[wrong].astype(np.float64), expected[wrong].astype(np.float64)
    norm = float(np.linalg.norm(theirs))
    far = float(np.linalg.norm(ours - theirs))
    return (
        f"differ by {far / norm:.2g} of their norm" if norm else f"differ by up to {np.abs(ours).max():.3g} from zero"
    )
