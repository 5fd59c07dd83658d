"""Sides made of a table of logits, for the tests of what `generate` decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aprjax.bisect.noise.logits import LogitNoise
from aprjax.bisect.report import SideInfo
from aprjax.checkpoint.types import Checkpoint, ModelConfig, Vocabulary
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.trace.generation import Generated, Likeliest, Passes, Scored, Stop, likeliest, rank_of

SIZE = 40
STOP = 39
PROMPT = (1, 2, 3)
Rule = Callable[[tuple[int, ...]], np.ndarray]


def bare_checkpoint(vocabulary: Vocabulary | None = None) -> Checkpoint:
    """A file without tensors: nothing of it is run."""
    config = ModelConfig("qwen2", 8, 1, 1, 1, 8, 8, SIZE, 64, 1e6, "neox", 1e-6)
    return Checkpoint(Path("nothing.gguf"), "gguf", config, {}, vocabulary, None, {})


def counting(tokens: tuple[int, ...]) -> np.ndarray:
    """Logits that make the next token the number of those before, well ahead of all others."""
    row = np.linspace(0, -1, SIZE, dtype=np.float32)
    row[len(tokens) % SIZE] = 5
    return row


def but(rule: Rule, step: int, change: Callable[[np.ndarray], None]) -> Rule:
    """The same rule, its logits changed at one new token."""

    def changed(tokens: tuple[int, ...]) -> np.ndarray:
        row = rule(tokens).copy()
        if len(tokens) - len(PROMPT) == step:
            change(row)
        return row

    return changed


@dataclass
class Table:
    """A side that computes nothing.

    Attributes:
        rule: the logits after some tokens, when they are fed one by one.
        at_once: the same when they are fed at once, if that rounds otherwise.
    """

    rule: Rule = counting
    at_once: Rule | None = None
    stop_ids: frozenset[int] = frozenset((STOP,))
    checkpoint: Checkpoint = field(default_factory=bare_checkpoint)
    arithmetic: Arithmetic = PRESETS["llama.cpp"]
    calls: list[str] = field(default_factory=list)
    engine: dict[str, str] = field(default_factory=dict)

    @property
    def batching_rounds(self) -> bool:
        return self.at_once is not None

    @property
    def info(self) -> SideInfo:
        return SideInfo("nothing.gguf", "0" * 64, "gguf", self.arithmetic.name)

    def forget(self) -> None:
        self.calls.append("forget")

    def generate(self, prompt: tuple[int, ...], max_new_tokens: int, *, ignore_stop: bool) -> Generated:
        self.calls.append(f"generate {len(prompt)}")
        tokens: list[int] = []
        rows = []
        stop = Stop.BUDGET
        while len(tokens) < max_new_tokens:
            rows.append(likeliest(self.rule((*prompt, *tokens))))
            tokens.append(int(rows[-1][0][0]))
            if tokens[-1] in self.stop_ids and not ignore_stop:
                stop = Stop.TOKEN
                break
        return Generated(tuple(tokens), Likeliest.of_rows(rows), stop, Passes(1, len(tokens) - 1, 0, 0.0))

    def score(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> Scored:
        self.calls.append(f"score {len(prompt)}+{len(given)}")
        rule = self.at_once or self.rule
        rows = [rule((*prompt, *given[:step])) for step in range(len(given))]
        return Scored(
            Likeliest.of_rows([likeliest(row) for row in rows]),
            np.array([row[token] for row, token in zip(rows, given, strict=True)], np.float32),
            np.array([rank_of(row, token) for row, token in zip(rows, given, strict=True)], np.int32),
            Passes(1, 0, len(prompt) + len(given), 0.0),
        )


@dataclass
class Noise:
    """A noise of a given size, and how often it was asked for."""

    sigma: float = 0.01
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, fed: tuple[int, ...], positions: tuple[int, ...]) -> LogitNoise:
        self.asked.append((fed, positions))
        return LogitNoise(self.sigma, (), positions)
