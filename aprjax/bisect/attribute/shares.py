"""Sums of gradient times error difference: what each stage's own error adds to the change of the metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprjax.bisect.attribute.values import Errors
from aprjax.qwen2.model import trim
from aprjax.qwen2.stages import Stage

Key = tuple[int, Stage]


@dataclass
class Differences:
    """The model's errors minus the reference's, made when asked for: all of them would be as large as a trace.

    Attributes:
        model: its errors.
        ref: the other's.
    """

    model: Errors
    ref: Errors

    def __iter__(self) -> Iterator[Key]:
        return iter({**self.model.values, **self.ref.values})

    def __getitem__(self, key: Key) -> np.ndarray:
        """`[position, width]`."""
        ours, theirs = self.model.at(*key), self.ref.at(*key)
        if ours is None or theirs is None:
            return np.asarray(ours) if theirs is None else -np.asarray(theirs)
        return np.asarray(ours) - np.asarray(theirs)


@dataclass
class Shares:
    """Shares of the stages, by position and by column; and the part of them that the model's file makes.

    Attributes:
        differences: what is multiplied by the gradients.
        count: of tokens.
        by_position, by_column: of every stage with an error.
        file_by_column: of the stages that read what the two files differ in.
    """

    differences: Differences
    count: int
    by_position: dict[Key, Any] = field(default_factory=dict)
    by_column: dict[Key, Any] = field(default_factory=dict)
    file_by_column: dict[Key, Any] = field(default_factory=dict)

    def add(self, layer: int, gradients: Mapping[Stage, np.ndarray], weight: float) -> None:
        """Adds one step's gradients."""
        known = set(self.differences)
        for stage, gradient in gradients.items():
            key = (layer, stage)
            if key not in known:
                continue
            at_the_head = stage in (Stage.FINAL_NORM, Stage.LM_HEAD)
            slope = (gradient if at_the_head else np.asarray(trim(stage, gradient, self.count))).astype(np.float64)
            product = slope * self.differences[key]
            self.by_position[key] = self.by_position.get(key, 0.0) + weight * product.sum(axis=1)
            self.by_column[key] = self.by_column.get(key, 0.0) + weight * product.sum(axis=0)
            from_file = self.differences.model.from_file.get(key)
            if from_file is not None:
                part = weight * np.einsum("pc,pc->c", slope, from_file)
                self.file_by_column[key] = self.file_by_column.get(key, 0.0) + part

    def total(self, key: Key) -> float:
        """One stage's share."""
        return float(np.sum(self.by_position.get(key, 0.0)))

    def from_file(self, key: Key, columns: slice = slice(None)) -> float:
        """The part of it that the model's file makes, of some columns."""
        found = self.file_by_column.get(key)
        return 0.0 if found is None else float(found[columns].sum())

    def sum(self) -> float:
        """All shares together."""
        return float(sum(self.total(key) for key in self.by_position))

    def largest(self) -> list[Key]:
        """The stages, the largest share of either sign first."""
        return sorted(self.by_position, key=lambda key: -abs(self.total(key)))
