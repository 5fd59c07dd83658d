"""What a trace's numbers say by themselves: values that are not finite, and a passage through half precision."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aprjax.bisect.cause import tensors_of
from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.explain.identity_dump import Dump, Key, layer_widths
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.replay.report import place
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.stages import OUTSIDE, STAGE_INPUTS, Stage

# So many different float32 are not all half-precision ones by accident: each is with a chance of 2^-13.
_LEAST = 16


def execution_order(keys: Iterable[Key]) -> list[Key]:
    """By the order in which a forward pass computes them: the head's stages last."""
    rank = {stage: index for index, stage in enumerate(Stage)}
    late = (Stage.FINAL_NORM, Stage.LM_HEAD)
    return sorted(keys, key=lambda key: (key[1] in late, key[0], rank[key[1]]))


def not_finite(dump: Dump, checkpoint: Checkpoint) -> IdentityFinding | None:
    """The first NaN or infinity in execution order, and whether the values before it were finite.

    Minus infinity among the scores is a mask, and no fault.
    """
    widths = layer_widths(checkpoint.config)
    first: tuple[Key, int, float] | None = None
    counts: dict[Key, int] = {}
    for key in execution_order(dump.keys):
        flat = dump.flat(key)
        bad = ~np.isfinite(flat)
        if key[1] is Stage.ATTN_SCORES:
            bad &= ~np.isneginf(flat)
        if not bad.any():
            continue
        counts[key] = int(np.count_nonzero(bad))
        if first is None:
            index = int(bad.argmax())
            first = key, index, float(flat[index])
    if first is None:
        return None
    key, index, value = first
    layer, stage = key
    width = widths.get(stage) or checkpoint.config.num_heads * len(dump.tokens or (0,))
    size = dump.flat(key).size
    row, channel = divmod(index, width)
    rows = dump.claimed_rows(key, size, width)
    position = rows[row] if rows is not None and row < len(rows) and size % width == 0 else None
    # A row whose position nobody vouches for has a number in the file alone.
    where = f"position {position}, channel {channel}" if position is not None else f"row {row}, channel {channel}"
    absent = [name for name in map(str, STAGE_INPUTS[stage]) if not _has(dump, layer, name)]
    if absent:
        born = f"its input {' and '.join(absent)} is not in the trace, so it may come from there"
    else:
        born = "its inputs are finite, so it was made here" if STAGE_INPUTS[stage] else "it is the first value of all"
    guilty = _not_finite_tensors(checkpoint, layer, stage)
    after = len(counts) - 1
    return IdentityFinding(
        "not-finite",
        f"{place(layer, stage)} holds {value} at {where}, the first in execution order; {born}"
        + (f"; {after} later values hold such, too" if after else ""),
        f"{guilty[0]} of the file is not finite: fetch or convert the file again"
        if guilty
        else f"look at the kernel that computes {stage}: the file's own weights there are finite",
        Confidence(Level.CERTAIN, f"{size:,} values of the stage were looked at"),
        stages=(stage,),
        layers=(layer,),
        evidence={
            "layer": layer,
            "stage": str(stage),
            "position": position,
            "row": row,
            "channel": channel,
            "value": str(value),
            "inherited": None if absent else False,
            "tensors": list(guilty),
            "values": {f"{at} {name}": count for (at, name), count in counts.items()},
        },
    )


def _has(dump: Dump, layer: int, name: str) -> bool:
    keys = set(dump.keys)
    if name != "previous":
        return (layer, Stage(name)) in keys
    if layer == OUTSIDE:  # the final norm's input
        return any(stage is Stage.POST_FFN_RESIDUAL for _, stage in keys)
    return ((layer - 1, Stage.POST_FFN_RESIDUAL) if layer else (OUTSIDE, Stage.EMBEDDING)) in keys


def _not_finite_tensors(checkpoint: Checkpoint, layer: int, stage: Stage) -> tuple[str, ...]:
    from aprjax.qwen2.loading import head_tensor

    found = []
    for name in tensors_of(layer, stage):
        tensor = checkpoint.tensors.get(name) or (head_tensor(checkpoint) if stage is Stage.LM_HEAD else None)
        if tensor is not None and not np.isfinite(tensor.decode()).all():
            found.append(name)
    return tuple(found)


def half_type(flat: np.ndarray, own: np.ndarray) -> str | None:
    """`float16` or `bfloat16` where every value is one, and the file's own values are not; empty where one is none.

    Args:
        flat: what the trace holds, float32.
        own: what the file gives there.

    Returns:
        None where nothing can be told: too few values, or the file's own are half-precision ones, too.
    """
    values = np.unique(flat[np.isfinite(flat) & (flat != 0)])
    if values.size < _LEAST:
        return None
    for name, is_half in (("bfloat16", _is_bfloat16), ("float16", _is_float16)):
        if is_half(values).all():
            return None if is_half(own.reshape(-1)).all() else name
    return ""


def _is_bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF) == 0


def _is_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32) == values


def half_finding(halves: dict[Key, str]) -> IdentityFinding | None:
    """A finding where every stage that can tell was dumped in half precision; some stages alone are the engine's doing.

    Args:
        halves: by label, what `half_type` says of it.
    """
    types = sorted(set(halves.values()))
    if not types or "" in types:
        return None
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
    return IdentityFinding(
        "half-precision",
        f"the trace was dumped as {' and '.join(types)}: all values are such, and the file's own are not",
        f"dump float32; until then differences up to {max(step[t] for t in types):.1e} of a value are the dump's",
        Confidence(Level.CERTAIN, f"every value of {len(halves)} stages was looked at"),
        severity="warning",
        stages=tuple(dict.fromkeys(stage for _, stage in halves)),
        layers=tuple(sorted({layer for layer, _ in halves})),
        evidence={"types": types, "stages": len(halves)},
    )
