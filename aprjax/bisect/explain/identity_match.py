"""Which point of the graph, which positions and which order of axes a dumped value is nearest to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from aprjax.bisect.explain.identity_dump import Dump, Key
from aprjax.bisect.explain.identity_points import Point, layouts
from aprjax.bisect.replay.judge import row_distances
from aprjax.bisect.replay.layers import BY_KEY
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

# Engines drift apart by some hundredths over a model's layers, and by a tenth between half precision and quantized
# weights (contracts.md 2.4: cosines down to 0.993). Values of unrelated places have a distance about the root of two.
CLOSE = 0.25
# A residual stream changes by little in one addition: of two places that are both close, the other one must be
# nearer by this factor before the label is doubted.
CLEARLY = 4.0
# Rows of a dump that are compared with every position, evenly spread.
_MOST_ROWS = 64
# What engines write where a key is hidden: minus infinity, or the most negative number that their type has.
_HIDDEN = -1e4


@dataclass(frozen=True)
class Reading:
    """What a dumped value is read as.

    Attributes:
        key: its label.
        point: the place in the graph that it equals.
        rows: the positions of its rows; empty: one row that is the mean over all positions.
        layout: how its numbers lie, in words; empty for the plain order.
        distance: relative L2 from that, of the row that is farthest.
        claimed: the same from what the label says; infinite where the sizes exclude it.
        claimed_rows: the positions that the label, or a sidecar, says; None where nothing says.
        padding: rows of zeros behind the last position.
        masked: whether hidden keys hold no score (of scores alone).
    """

    key: Key
    point: Point
    rows: tuple[int, ...] | None
    layout: str
    distance: float
    claimed: float
    claimed_rows: tuple[int, ...] | None
    padding: int = 0
    masked: bool = False

    @property
    def close(self) -> bool:
        """Whether some reading explains the value at all."""
        return self.distance <= CLOSE

    @property
    def as_labelled(self) -> bool:
        """Whether it is what its label says."""
        return self.point == Point(*self.key) and self.rows == self.claimed_rows and not self.layout


def read_value(
    dump: Dump, key: Key, points: Mapping[Point, np.ndarray], config: ModelConfig, count: int
) -> Reading | None:
    """The best reading of a value; what its label says, unless another is clearly nearer.

    Args:
        dump: the numbers.
        key: which of them.
        points: the graph's values near its layer.
        config: of the file.
        count: positions that were run.

    Returns:
        None where the value is not finite, or of a size that no reading has.
    """
    label = Point(*key)
    expected = points.get(label)
    flat = dump.flat(key)
    if expected is None or not flat.size:
        return None
    width = expected.shape[1]
    flat, padding = _without_padding(flat, width, count)
    raw = flat
    if key[1] in dump.by_heads:
        flat = _by_position(flat, key[1], width, count, config)
    claimed_rows = dump.claimed_rows(key, flat.size, width)
    claimed = Reading(key, label, claimed_rows, "", np.inf, np.inf, claimed_rows, padding)
    if flat.size % width == 0:
        found, masked = _visible(key[1], flat.reshape(-1, width), claimed_rows, config.num_heads)
        claimed = replace(claimed, masked=masked)
        if claimed_rows is not None and len(claimed_rows) == len(found) and np.isfinite(found).all():
            wanted, _ = _visible(key[1], expected[list(claimed_rows)], claimed_rows, config.num_heads)
            distance = float(row_distances(found, wanted).max())
            claimed = replace(claimed, distance=distance, claimed=distance)
    best = claimed
    # Nothing can be clearly nearer than this.
    if claimed.distance <= CLOSE / CLEARLY and not _may_hide(key[1]):
        return claimed
    if key[1] in BY_KEY:
        flat, raw = (np.where(numbers <= _HIDDEN, np.float32(0), numbers) for numbers in (flat, raw))
    if not np.isfinite(flat).all():
        return None
    orders = layouts(raw, key[1], count, config, by_heads=key[1] in dump.by_heads) if raw.size == width * count else ()
    arranged = [(words, value) for words, value in orders if words]
    limit = min(CLOSE, claimed.distance / CLEARLY)
    for reading in _others(key, flat, arranged, points, config, limit=limit):
        if reading.distance < best.distance:
            best = replace(reading, claimed=claimed.distance, claimed_rows=claimed_rows, padding=padding)
    nearer = best.distance <= CLOSE and best.distance * CLEARLY <= claimed.distance
    return best if nearer else claimed


def _may_hide(stage: Stage) -> bool:
    """Whether an addition before or after the stage changes so little that a label may be close and wrong."""
    return stage in (Stage.POST_ATTN_RESIDUAL, Stage.POST_FFN_RESIDUAL, Stage.EMBEDDING)


def _without_padding(flat: np.ndarray, width: int, count: int) -> tuple[np.ndarray, int]:
    rows = flat.size // width if flat.size % width == 0 else 0
    if rows > count and not flat[count * width :].any():
        return flat[: count * width], rows - count
    return flat, 0


def _visible(stage: Stage, value: np.ndarray, rows: tuple[int, ...] | None, heads: int) -> tuple[np.ndarray, bool]:
    """Scores with the hidden keys set to zero, and whether they held none; other values as they are."""
    if stage not in BY_KEY or value.shape[1] % heads:
        return value, False
    keys = value.shape[1] // heads
    at = np.arange(len(value)) if rows is None or len(rows) != len(value) else np.asarray(rows)
    hidden = np.broadcast_to((np.arange(keys)[None] > at[:, None])[:, None], (len(value), heads, keys))
    grid = value.reshape(len(value), heads, keys)
    inside = grid[hidden]
    empty = inside.size > 0 and bool(((inside <= _HIDDEN) | (inside == 0)).all())
    return np.where(hidden, np.float32(0), grid).reshape(value.shape), empty and stage is Stage.ATTN_SCORES


def _by_position(flat: np.ndarray, stage: Stage, width: int, count: int, config: ModelConfig) -> np.ndarray:
    """Numbers that lie head by head, position by position."""
    heads = config.num_kv_heads if stage is Stage.K_POST_ROPE else config.num_heads
    if flat.size != width * count:
        return flat
    return flat.reshape(heads, count, -1).transpose(1, 0, 2).reshape(-1)


def _others(
    key: Key,
    flat: np.ndarray,
    arranged: list[tuple[str, np.ndarray]],
    points: Mapping[Point, np.ndarray],
    config: ModelConfig,
    *,
    limit: float,
) -> Iterator[Reading]:
    """Every other reading that may lie within `limit`: its point, then its rows, then its order."""
    stage = key[1]
    for point, value in _nearest_first(points, *key):
        width = value.shape[1]
        if flat.size % width or (stage in BY_KEY) != (point.stage in BY_KEY):
            continue
        rows = flat.reshape(-1, width)
        yield from _by_rows(key, point, rows, value, config, limit=limit)
        for words, numbers in arranged:
            if numbers.shape == value.shape:
                everyone = tuple(range(len(value)))
                seen, _ = _visible(stage, numbers, everyone, config.num_heads)
                wanted, _ = _visible(point.stage, value, everyone, config.num_heads)
                distance = float(row_distances(seen, wanted).max())
                yield Reading(key, point, everyone, words, distance, np.inf, None)


def _nearest_first(points: Mapping[Point, np.ndarray], layer: int, stage: Stage) -> list[tuple[Point, np.ndarray]]:
    """The label's own point, then those of its layer, then the neighbours': the simplest reading wins a tie."""
    return sorted(
        points.items(), key=lambda item: (item[0].layer != layer, item[0].stage is not stage, item[0].variant)
    )


def _by_rows(
    key: Key, point: Point, found: np.ndarray, value: np.ndarray, config: ModelConfig, *, limit: float
) -> Iterator[Reading]:
    """The rows matched with positions one by one, and one row with their mean."""
    count = len(value)
    if key[1] in BY_KEY and len(found) == count:
        # Which keys are hidden goes by the position: only the plain order is tried.
        everyone = tuple(range(count))
        ours, theirs = (_visible(key[1], v, everyone, config.num_heads)[0] for v in (found, value))
        yield Reading(key, point, everyone, "", float(row_distances(ours, theirs).max()), np.inf, None)
        return
    # One row that is far from every position settles it, and behind a fault nearly all are. The last, since of the
    # first position's few massive channels every layer's residual stream has the same.
    if not row_distances(np.broadcast_to(found[-1], value.shape), value).min() > limit:
        rows, distance = nearest_rows(found, value)
        yield Reading(key, point, rows, "", distance, np.inf, None)
    if len(found) == 1 and count > 1:
        mean = value.mean(axis=0, dtype=np.float64)[None]
        yield Reading(key, point, (), "", float(row_distances(found, mean).max()), np.inf, None)


def nearest_rows(found: np.ndarray, value: np.ndarray) -> tuple[tuple[int, ...], float]:
    """For each row of `found[r, w]`, the position of `value[t, w]` that it is nearest to; and the largest distance.

    Of equal positions (the same token twice, say) a row's own counts first, then the last.
    """
    some = np.unique(np.linspace(0, len(found) - 1, min(len(found), _MOST_ROWS)).astype(np.int64))
    ours, theirs = found[some].astype(np.float64), value.astype(np.float64)
    norms = np.einsum("ij,ij->i", theirs, theirs)
    squared = np.einsum("ij,ij->i", ours, ours)[:, None] + norms - 2 * ours @ theirs.T
    relative = np.sqrt(np.maximum(squared, 0) / np.where(norms > 0, norms, 1e-30))
    # The difference of squares leaves half of the digits: equal means equal to those.
    near = relative <= relative.min(axis=1, keepdims=True) * 1.001 + 1e-6
    whole = _in_order(near, some) if len(found) == len(value) else None
    chosen, farthest = {}, 0.0
    for place, row in enumerate(some.tolist()):
        own = int(np.flatnonzero(near[place])[-1]) if whole is None else int(whole[row])
        chosen[row] = own
        farthest = max(farthest, float(row_distances(found[row : row + 1], value[own : own + 1])[0]))
    if whole is not None:
        return tuple(whole.tolist()), farthest
    if len(chosen) < len(found):
        steps = {own - row for row, own in chosen.items()}
        if len(steps) != 1:  # no shift: each row must be looked at, or none is named
            return tuple(chosen.get(row, -1) for row in range(len(found))), farthest
        (step,) = steps
        return tuple(row + step for row in range(len(found))), farthest
    return tuple(chosen[row] for row in range(len(found))), farthest


def _in_order(near: np.ndarray, some: np.ndarray) -> np.ndarray | None:
    """The simplest order of all positions in which every row is near its own: as they are, reversed, or shifted.

    Args:
        near: by looked-at row and position.
        some: the rows that were looked at.
    """
    count = near.shape[1]
    everyone = np.arange(count)
    orders = (everyone, everyone[::-1], *(np.roll(everyone, step) for step in range(1, count)))
    places = np.arange(len(some))
    return next((order for order in orders if near[places, order[some]].all()), None)
