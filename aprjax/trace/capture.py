"""`Capture`: which layers, stages and positions of a run are kept; the rest is computed and let go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from aprjax.checkpoint.types import CheckpointError, UnmeasurableError
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace.memory import AnyTrace
from aprjax.trace.trace import TraceInfo

HEAD_STAGES = (Stage.FINAL_NORM, Stage.LM_HEAD)


@dataclass(frozen=True)
class Capture:
    """What is kept of a run.

    Attributes:
        layers: their numbers, -1 for the stages outside the layers; None: all.
        stages: None: all.
        positions: `all`, `last` or `A..B`, both counted, from 0.
    """

    layers: frozenset[int] | None = None
    stages: frozenset[Stage] | None = None
    positions: str = "all"

    @classmethod
    def parse(cls, *, layers: str | None = None, stages: str | None = None, positions: str = "all") -> Capture:
        """From the command line's words: `0,3,10..12` and `ffn_gate,ffn_up`.

        Raises:
            ValueError: saying what was expected and found.
        """
        return cls(
            None if layers is None else frozenset(_numbers(layers)),
            None if stages is None else frozenset(_stages(stages)),
            positions,
        )

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self == EVERYTHING

    def wants(self, layer: int, stage: Stage) -> bool:
        """Whether this value is kept."""
        return (self.layers is None or layer in self.layers) and (self.stages is None or stage in self.stages)

    def last_layer(self, count: int) -> int:
        """The last of `count` layers that must run; `count` itself where the head must, too.

        Raises:
            CheckpointError: a layer is asked for that the model does not have.
        """
        beyond = [layer for layer in self.layers or () if layer >= count]
        if beyond:
            raise CheckpointError(
                f"layer {min(beyond)} is asked for, and the model has {count}", fix=f"ask for layers 0 to {count - 1}"
            )
        if any(self.wants(OUTSIDE, stage) for stage in HEAD_STAGES):
            return count
        wanted = [layer for layer in range(count) if any(self.wants(layer, stage) for stage in LAYER_STAGES)]
        return max(wanted, default=OUTSIDE)

    def info(self, info: TraceInfo) -> TraceInfo:
        """The description of what is left of a trace.

        Raises:
            UnmeasurableError: the trace has none of the positions.
        """
        chosen = set(chosen_positions(self.positions, len(info.tokens)))
        left = [tuple(p for p in rows if p in chosen) for rows in (info.positions, info.head_positions)]
        if not left[0] and not left[1]:
            raise UnmeasurableError(f"the trace has none of the positions {self.positions}", file=info.path)
        return replace(info, positions=left[0], head_positions=left[1])


# Nothing is left out.
EVERYTHING = Capture()


def chosen_positions(text: str, count: int) -> tuple[int, ...]:
    """The positions that `last`, `all` or `A..B` name among `count` tokens.

    Raises:
        CheckpointError: they reach beyond the prompt.
    """
    if text == "all":
        return tuple(range(count))
    if text == "last":
        return (count - 1,)
    first, _, last = text.partition("..")
    if int(last) >= count:
        raise CheckpointError(
            f"positions {text} reach beyond the prompt's {count} tokens", fix=f"ask for positions up to {count - 1}"
        )
    return tuple(range(int(first), int(last) + 1))


class Selected:
    """The kept part of a trace that is there already; an engine's own nodes are no stages, and not kept."""

    extra: Mapping[str, np.ndarray] = {}

    def __init__(self, trace: AnyTrace, capture: Capture) -> None:
        """Chooses; values are read when they are asked for.

        Raises:
            CheckpointError: nothing is left.
        """
        self.info = capture.info(trace.info)
        self._trace = trace
        self._keys = [key for key in trace if capture.wants(*key)]
        if not self._keys:
            raise UnmeasurableError("the trace has none of the layers and stages asked for", file=trace.info.path)

    def __getitem__(self, key: tuple[int, Stage]) -> np.ndarray:
        """One value's kept rows."""
        if key not in self._keys:
            raise KeyError(key)
        all_of, kept = (
            (info.head_positions if key[1] in HEAD_STAGES else info.positions) for info in (self._trace.info, self.info)
        )
        at = {position: row for row, position in enumerate(all_of)}
        return self._trace[key][[at[position] for position in kept]]

    def __iter__(self) -> Iterator[tuple[int, Stage]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(-1|\d+)(?:\.\.(\d+))?\s*", part)
        if bounds is None or (bounds[2] is not None and int(bounds[1]) > int(bounds[2])):
            raise ValueError(f"expected layers as 0,3,10..12 (-1: outside the layers), found {text!r}")
        yield from range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)


def _stages(text: str) -> Iterator[Stage]:
    for part in text.split(","):
        try:
            yield Stage(part.strip())
        except ValueError:
            raise ValueError(
                f"expected stages with commas between them, found {part.strip()!r}; known: {', '.join(Stage)}"
            ) from None
