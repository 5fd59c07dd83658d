"""The noise floor of a logit: how far legitimate changes of one computation move it, measured on the tokens at hand.

A flip is decided by a *gap*, the difference of two logits. So sigma is defined by gaps: within the
`PLAUSIBLE` likeliest tokens of a position, the sample variance (ddof = 1) of the logits' change is exactly
half the mean square of the gaps' change over all pairs. `sigma` is the root of that variance's mean over the
positions; a gap then moves by sqrt(2) * sigma in the root mean square, by construction and not by an
assumption of independence. A shift of all logits alike, which moves no gap, does not count. Tokens that
nobody would choose do not count either.

Two runs of integer arithmetic are equal or far apart: where one unit in the last place moves an activation
across a rounding boundary, the step cascades (kernels.md, section 5), and in a model of some 20 layers that
always happens. In a tiny model it may not; then sigma is that of the sums alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.lockstep import Runner
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.changed_runs import head_batches, sweep, variants
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.loading import require_runnable
from aprjax.trace.engine import check_tokens

# The likeliest tokens of a position whose gaps are measured.
PLAUSIBLE = 10
# Positions that are fed one at a time, at most: the last ones. Each costs a decoding step.
STEPS = 32


@dataclass(frozen=True)
class ChangeNoise:
    """What one change of one side does to the logits.

    Attributes:
        side: which side was changed: "model" or "ref".
        arithmetic: that side's.
        change: what was changed.
        sigma: the root mean square, over the positions, of the standard deviation of the change of the
            `PLAUSIBLE` likeliest tokens' logits.
        sigma_vocabulary: the same over the whole vocabulary.
        sigma_top2: the root mean square of the top-2 gap's change, over sqrt(2): what `sigma` stands for, of
            the one gap that decides.
        largest_gap_change: of the top-2 gap.
        flips: positions whose best token changes.
        positions: how many positions were measured.
    """

    side: str
    arithmetic: str
    change: str
    sigma: float
    sigma_vocabulary: float
    sigma_top2: float
    largest_gap_change: float
    flips: int
    positions: int

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class LogitNoise:
    """The measured noise floor of a pair's logits.

    Attributes:
        sigma: in logits: the largest of the changes'; a gap's standard deviation is sqrt(2) times it.
        changes: what each change came to.
        positions: where it was measured.
        skipped: changes that could not be made, and why.
        seconds: what measuring took.
    """

    sigma: float
    changes: tuple[ChangeNoise, ...]
    positions: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def near_tie_gap(self) -> float:
        """The largest gap, in logits, that the noise explains."""
        return NEAR_TIE_SIGMAS * self.sigma

    def in_sigmas(self, gap: float) -> float | None:
        """A gap in units of sigma; None where sigma is zero and the gap is not."""
        if gap == 0:
            return 0.0
        return gap / self.sigma if self.sigma > 0 else None

    def is_near_tie(self, gap: float, rank: int) -> bool:
        """Whether the other side's choice, of this rank (from 1) and this far behind, is put down to noise."""
        return rank <= 2 and gap <= self.near_tie_gap

    @property
    def method(self) -> str:
        """How sigma was measured, in a sentence."""
        return (
            f"root mean square over {len(self.positions)} positions of the standard deviation (ddof 1) by which a "
            f"change moves the logits of the {PLAUSIBLE} likeliest tokens; the largest of the changes"
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "sigma": self.sigma,
            "near_tie_sigmas": NEAR_TIE_SIGMAS,
            "near_tie_gap": self.near_tie_gap,
            "method": self.method,
            "positions": list(self.positions),
            "changes": [change.to_json() for change in self.changes],
            "skipped": list(self.skipped),
            "seconds": round(self.seconds, 3),
        }


def measure_logit_noise(
    model: Runner | None,
    ref: Runner | None,
    tokens: Sequence[int],
    positions: Iterable[int] | None = None,
    *,
    steps: int = STEPS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LogitNoise:
    """Runs each side with one change at a time, layer by layer: one layer of one side is in memory.

    Both sides are measured where their arithmetics or block types differ, else the reference alone.

    Args:
        model: one side; None to measure the other alone.
        ref: the other; likewise.
        tokens: what both are fed.
        positions: where to measure; by default everywhere.
        steps: how many of the last tokens are also fed one at a time; 0 leaves that change out.
        progress: told which side, and how many layers of how many are done.

    Raises:
        CheckpointError: a file lacks what a forward pass needs, or has no such tokens.
        ValueError: a position lies outside the tokens, or there is none.
    """
    start = time.perf_counter()
    ids = [int(token) for token in tokens]
    rows = list(range(len(ids)) if positions is None else positions)
    if not rows or min(rows) < 0 or max(rows) >= len(ids):
        raise ValueError(f"the positions ({len(rows)}) do not all lie within the {len(ids)} tokens")
    sides = {name: side for name, side in (("ref", ref), ("model", model)) if side is not None}
    if (
        ref is not None
        and model is not None
        and model.arithmetic == ref.arithmetic
        and same_types(model.checkpoint, ref.checkpoint)
    ):
        del sides["model"]
    changes: list[ChangeNoise] = []
    skipped: list[str] = []
    for side, runner in sides.items():
        require_runnable(runner.checkpoint)
        check_tokens(runner.checkpoint, ids)
        found, reasons = _measure(
            side,
            runner,
            ids,
            rows,
            steps=min(steps, len(ids) - 1),
            progress=lambda done, total, side=side: progress(f"noise of the {side}", done, total),
        )
        changes += found
        skipped += [f"{side}: {reason}" for reason in reasons]
    return LogitNoise(
        sigma=max((change.sigma for change in changes), default=0.0),
        changes=tuple(changes),
        positions=tuple(rows),
        skipped=tuple(skipped),
        seconds=time.perf_counter() - start,
    )


def same_types(model: Checkpoint, ref: Checkpoint) -> bool:
    """Whether the two files hold the same kinds of blocks, so that one stands for both."""
    kinds = [{name: tensor.block_type for name, tensor in side.tensors.items()} for side in (model, ref)]
    return all(kinds[0].get(name, kind) == kind for name, kind in kinds[1].items())


def _measure(
    side: str,
    runner: Runner,
    tokens: list[int],
    rows: list[int],
    *,
    steps: int,
    progress: Callable[[int, int], None],
) -> tuple[list[ChangeNoise], list[str]]:
    ways, skipped = variants(runner, steps)
    hidden = sweep(runner, tokens, ways, progress)
    base, *changed = ways
    sums = [_ChangeSums() for _ in changed]
    for positions, (logits, *others) in head_batches(runner, [base, *changed], hidden, rows):
        for way, total, other in zip(changed, sums, others, strict=True):
            # Positions before the stepped ones were fed together, as in the unchanged run.
            stepped = [at for at, position in enumerate(positions) if position >= len(tokens) - way.steps]
            chosen = stepped if way.steps else list(range(len(positions)))
            # Where a logit is not finite there is no noise, but a fault.
            chosen = [at for at in chosen if np.isfinite(logits[at]).all() and np.isfinite(other[at]).all()]
            if chosen:
                total.add(logits[chosen], other[chosen])
    found = [
        total.report(side, runner.arithmetic.name, way.name)
        for way, total in zip(changed, sums, strict=True)
        if total.count
    ]
    return found, skipped


class _ChangeSums:
    """The sums that `ChangeNoise` is made of; logits come in batches of positions."""

    def __init__(self) -> None:
        self.count = self.flips = 0
        self.plausible = self.vocabulary = self.gap = self.largest = 0.0

    def add(self, base: Float[np.ndarray, "position vocab"], changed: Float[np.ndarray, "position vocab"]) -> None:
        """Adds positions of the run as it is and of the changed one."""
        delta = changed.astype(np.float64) - base.astype(np.float64)
        likeliest = plausible_tokens(base)
        moved = np.take_along_axis(delta, likeliest, axis=1)
        top2 = moved[:, 1] - moved[:, 0]
        self.plausible += float(moved.var(axis=1, ddof=1).sum())
        self.vocabulary += float(delta.var(axis=1, ddof=1).sum())
        self.gap += float((top2**2).sum())
        self.largest = max(self.largest, float(np.abs(top2).max()))
        self.flips += int(np.count_nonzero(base.argmax(axis=1) != changed.argmax(axis=1)))
        self.count += len(base)

    def report(self, side: str, arithmetic: str, change: str) -> ChangeNoise:
        """The roots of the means."""
        return ChangeNoise(
            side=side,
            arithmetic=arithmetic,
            change=change,
            sigma=float(np.sqrt(self.plausible / self.count)),
            sigma_vocabulary=float(np.sqrt(self.vocabulary / self.count)),
            sigma_top2=float(np.sqrt(self.gap / self.count / 2)),
            largest_gap_change=self.largest,
            flips=self.flips,
            positions=self.count,
        )


def plausible_tokens(logits: Float[np.ndarray, "position vocab"], count: int = PLAUSIBLE) -> np.ndarray:
    """The ids of the `count` likeliest tokens of each position, likeliest first, `int[position, count]`.

    Among equal logits the lower id comes first, as in greedy decoding.
    """
    return np.stack([_best(row, min(count, len(row))) for row in logits])


def _best(row: Float[np.ndarray, " vocab"], count: int) -> np.ndarray:
    # Not argpartition: which of several equal logits it takes at the edge is arbitrary.
    edge = np.partition(row, len(row) - count)[len(row) - count]
    found = np.flatnonzero(row >= edge)
    return found[np.argsort(-row[found], kind="stable")][:count]
