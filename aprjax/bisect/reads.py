"""What of two files each stage reads, as far as they differ: tensors by the columns that they make, and config keys."""

from __future__ import annotations

from aprjax.bisect.cause import STAGE_CONFIG, tensors_of
from aprjax.bisect.files import FilesReport
from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage


def differing_keys(stage: Stage, files: FilesReport) -> tuple[str, ...]:
    """The config keys that the stage computes with and that differ."""
    return tuple(key for key in STAGE_CONFIG.get(stage, ()) if key in files.config)


def differs_at(layer: int, stage: Stage, files: FilesReport) -> bool:
    """Whether the stage reads a value that differs; another encoding of equal values is none."""
    return bool(differing_keys(stage, files)) or any(_differs(name, files) for name in tensors_of(layer, stage))


def differing_reads(layer: int, stage: Stage, files: FilesReport, config: ModelConfig) -> tuple[tuple[str, slice], ...]:
    """The name and the columns of everything differing that the stage reads.

    Queries, keys and values lie side by side. A norm whose weight and epsilon both differ has one entry for both: their
    parts cannot be told apart at the stage.
    """
    keys = " and ".join(differing_keys(stage, files))
    names = tensors_of(layer, stage)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    columns = [slice(0, q), slice(q, q + kv), slice(q + kv, None)] if len(names) == 3 else [slice(None)]
    found = [(name, part) for name, part in zip(names, columns, strict=False) if _differs(name, files)]
    if keys and found:
        return tuple((f"{name} and {keys}", part) for name, part in found)
    return ((keys, slice(None)),) if keys else tuple(found)


def _differs(name: str, files: FilesReport) -> bool:
    difference = files.tensor(name)
    return difference is not None and not difference.same_values
