"""Hypotheses about rotary positions: base, pairing, direction, width, offset, scaling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.fit import FitSpec
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node, Parameter
from aprjax.bisect.explain.proposals import Number, choice, fitted, kernel_step, misfit, shown, with_error
from aprjax.bisect.explain.unseen import of_stretch, of_theta
from aprjax.bisect.explain.variant import Variant
from aprjax.qwen2.stages import Stage

ROTATIONS = (Stage.Q_POST_ROPE, Stage.K_POST_ROPE)
# The rotation's phase at position p changes by at most p * 0.37 / ln(theta) radians for a unit of ln(theta): over
# this many positions a scan with steps of half a unit cannot miss the basin.
_SCAN_ROWS = 32
_SCAN_STEP = 0.5
# Bases in use lie between 500 and 10^8.
_BASES = (1e2, 1e9)
# Offsets that are looked for: those of a BOS and of left padding.
_MOST_OFFSET = 64


def _several_positions(evidence: Evidence, node: Node) -> bool:
    # Position 0 is not rotated.
    return len(evidence.positions) > 1


def _theta_starts(evidence: Evidence, node: Node) -> Iterator[float]:
    yield evidence.config.rope_theta
    low, high = np.log(_BASES[0]), np.log(_BASES[1])
    yield from np.exp(np.arange(low, high + _SCAN_STEP, _SCAN_STEP)).tolist()


def _stretch_starts(evidence: Evidence, node: Node) -> Iterator[float]:
    # Linear scaling is by small whole numbers, one way or the other; the fit finds what lies between.
    yield from (1.0, 0.75, 1.5, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0)


def _with_theta(variant: Variant, value: Any) -> Variant:
    return replace(variant, theta=value)


def _with_stretch(variant: Variant, value: Any) -> Variant:
    return replace(variant, stretch=value)


def _offsets(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    # Scores hang on differences of positions alone: an offset shows in the rotated values or nowhere.
    if node[1] not in ROTATIONS:
        return
    spec = FitSpec(lambda variant, value: replace(variant, offset=round(value)), frozenset(ROTATIONS))
    options = [*range(-_MOST_OFFSET, 0), *range(1, _MOST_OFFSET + 1)]
    best = min(options, key=lambda offset: misfit(evidence, node, spec, offset, _SCAN_ROWS))
    yield Candidate(
        f"positions begin at {best} instead of 0",
        lambda variant: replace(variant, offset=best),
        parameters={"offset": Parameter(best, None, 0)},
        next_step=f"feed the first token at position 0: the engine counts {abs(best)} "
        f"{'more' if best > 0 else 'fewer'} (a BOS, padding on the left, or a cache that was not emptied)",
    )


HYPOTHESES: tuple[Hypothesis, ...] = (
    *(
        choice(
            f"rope-pairing-{pairing}",
            ROTATIONS,
            f"channels are paired for the rotation as {words}",
            kind="config",
            next_step=f"correct the rotation's pairing (rope_type): this model pairs {other}",
            applies=lambda evidence, node, pairing=pairing: evidence.config.rope_pairing != pairing,
            pairing=pairing,
        )
        for pairing, words, other in (
            ("norm", "2i with 2i + 1 instead of i with i + half", "i with i + half of a head (NEOX)"),
            ("neox", "i with i + half instead of 2i with 2i + 1", "2i with 2i + 1 (NORM)"),
        )
    ),
    choice("rope-missing", ROTATIONS, "queries and keys are not rotated", applies=_several_positions, rotated=""),
    choice("rope-backwards", ROTATIONS, "the rotation turns the other way", applies=_several_positions, backwards=True),
    fitted(
        "rope-theta",
        ROTATIONS,
        Number(
            "rope_theta",
            _with_theta,
            lambda config: config.rope_theta,
            starts=_theta_starts,
            logarithmic=True,
            rows=_SCAN_ROWS,
            unseen=of_theta,
        ),
        lambda value, error, evidence: (
            f"rope_theta = {with_error(value, error)} instead of {shown(evidence.config.rope_theta)}"
        ),
        kind="config",
        next_step="correct rope_theta: the engine ran with {value}; convert the model again, or fix what it reads",
        applies=_several_positions,
    ),
    Hypothesis(
        "position-offset",
        "computation",
        frozenset(ROTATIONS),
        _offsets,
        kernel_step(ROTATIONS, "its positions"),
        kernel_step(ROTATIONS, "its positions"),
    ),
    fitted(
        "rope-scaling",
        ROTATIONS,
        Number("position_factor", _with_stretch, starts=_stretch_starts, rows=_SCAN_ROWS, unseen=of_stretch),
        lambda value, error, evidence: f"positions are multiplied by {with_error(value, error)} before the rotation",
        kind="config",
        next_step="turn off linear rope scaling: positions were multiplied by {value}",
        applies=_several_positions,
        generalises=("rope-missing",),
    ),
    *(
        choice(
            f"rope-width-{part}",
            ROTATIONS,
            f"only the first {words} of a head's channels are rotated",
            applies=_several_positions,
            rope_width=width,
        )
        for part, words, width in (("32", "32", 32), ("64", "64", 64))
    ),
)
