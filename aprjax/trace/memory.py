"""`MemoryTrace`: a trace held in memory, and `AnyTrace`: what saved ones and these have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from aprjax.qwen2.stages import Stage
from aprjax.trace.trace import Trace, TraceInfo, TraceWriter, in_order


class AnyTrace(Protocol):
    """A side's values by (layer, stage), in execution order within a layer."""

    @property
    def info(self) -> TraceInfo:
        """What this is a trace of."""
        ...

    @property
    def extra(self) -> Mapping[str, np.ndarray]:
        """An engine's own values by its own names (`kq-3:MUL_MAT`), if they were asked for."""
        ...

    def __getitem__(self, key: tuple[int, Stage], /) -> np.ndarray:
        """One value, `float32[position, width]`; KeyError where it was not captured."""
        ...

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        """The (layer, stage) of every captured value."""
        ...

    def __len__(self) -> int:
        """The number of captured values."""
        ...


@dataclass(frozen=True)
class MemoryTrace:
    """A trace in memory.

    Attributes:
        info: what it is a trace of.
        values: `float32[position, width]` by (layer, stage).
        extra: an engine's own values by its own names.
    """

    info: TraceInfo
    values: Mapping[tuple[int, Stage], np.ndarray]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, saved: Trace | str | Path) -> MemoryTrace:
        """Reads a saved trace whole.

        Raises:
            CheckpointError: the file is no trace of aprjax, or damaged.
        """
        trace = saved if isinstance(saved, Trace) else Trace.load(saved)
        return cls(trace.info, {key: trace[key] for key in trace}, dict(trace.extra))

    def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
        """One value, `float32[position, width]`."""
        return self.values[key]

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        return iter(in_order(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"<MemoryTrace of {Path(info.path).name}: {len(self)} values, {len(info.tokens)} tokens, {info.arithmetic}>"
        )


def save(trace: AnyTrace, path: str | Path) -> None:
    """Writes any trace as a safetensors file, which appears when it is complete."""
    keys = list(trace)
    layers = max((layer for layer, _ in keys), default=-1) + 1
    with TraceWriter(Path(path), trace.info, layers=layers, extra=len(trace.extra)) as writer:
        for key in keys:
            writer.write(*key, trace[key])
        for name, values in trace.extra.items():
            writer.write_extra(name, values)
