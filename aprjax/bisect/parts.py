"""Which heads, channels and positions of a stage's value carry its difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aprjax.bisect.locate.report import Parts
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

# The parts named are those that hold this share of the squared difference; what is left is a thousandth of
# it, about 3 % of its size, which a patch of the named parts then has to do without.
_SHARE = 0.999
# Channels are looked at in groups as long as a K-quant's block, the unit in which an encoder goes wrong.
_GROUP = 256


@dataclass(frozen=True)
class Unit:
    """A head or a group of channels, and its columns."""

    name: str
    columns: slice


def carrying_parts(stage: Stage, difference: np.ndarray, config: ModelConfig) -> tuple[Parts, np.ndarray] | None:
    """The fewest parts that carry the difference, and a mask `bool[position, width]` of them.

    Args:
        stage: whose value it is.
        difference: `float[position, width]`, without padding.
        config: has the heads.

    Returns:
        None where the difference is not concentrated: where more than half of the parts are needed, and
        more than half of the positions.
    """
    squares = np.square(difference.astype(np.float64))
    total = float(squares.sum())
    if not np.isfinite(total) or total == 0:
        return None
    kind, units = _units(stage, difference.shape[1], config)
    by_unit = np.array([float(squares[:, unit.columns].sum()) for unit in units])
    chosen = _fewest(by_unit)
    positions = _fewest(squares.sum(axis=1))
    few_units = len(units) > 1 and 2 * len(chosen) <= len(units)
    few_positions = len(difference) > 1 and 2 * len(positions) <= len(difference)
    if not (few_units or few_positions):
        return None
    mask = np.zeros(difference.shape, bool)
    for index in chosen if few_units else range(len(units)):
        mask[:, units[index].columns] = True
    if few_positions:
        mask[np.setdiff1d(np.arange(len(difference)), positions)] = False
    names = tuple(units[index].name for index in chosen) if few_units else ("all",)
    shown = tuple(int(p) for p in positions) if few_positions else tuple(range(len(difference)))
    return Parts(kind, names, shown, float(squares[mask].sum()) / total, len(units)), mask


def _fewest(sums: np.ndarray) -> Sequence[int]:
    """The indices of the largest sums that together hold `_SHARE`, in their own order."""
    order = np.argsort(-sums, kind="stable")
    needed = int(np.searchsorted(np.cumsum(sums[order]), _SHARE * sums.sum())) + 1
    return [int(index) for index in np.sort(order[:needed])]


def stage_units(stage: Stage, width: int, config: ModelConfig) -> list[Unit]:
    """The heads, or groups of 256 channels, of a stage's value."""
    return _units(stage, width, config)[1]


def _units(stage: Stage, width: int, config: ModelConfig) -> tuple[str, list[Unit]]:
    head = config.head_dim
    if stage in (Stage.QKV_MATMUL, Stage.QKV_BIAS):
        counts = (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads))
        names = [f"{which} head {index}" for which, count in counts for index in range(count)]
        return "heads", [Unit(name, slice(i * head, (i + 1) * head)) for i, name in enumerate(names)]
    if stage in (Stage.Q_POST_ROPE, Stage.K_POST_ROPE, Stage.ATTENTION):
        return "heads", [Unit(f"head {i}", slice(i * head, (i + 1) * head)) for i in range(width // head)]
    if stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):
        keys = width // config.num_heads
        return "heads", [Unit(f"head {i}", slice(i * keys, (i + 1) * keys)) for i in range(config.num_heads)]
    starts = range(0, width, _GROUP)
    return "channels", [Unit(f"{s} to {min(s + _GROUP, width) - 1}", slice(s, s + _GROUP)) for s in starts]
