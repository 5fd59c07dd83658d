"""Rotation tables: closed form against ggml's recurrence."""

from __future__ import annotations

import numpy as np
import pytest

from aprjax.qwen2.rope import rope_tables


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_recurrence_follows_the_closed_form(theta: float, head_dim: int) -> None:
    positions = np.arange(512)
    exact = rope_tables(positions, theta=theta, head_dim=head_dim, dtype="float64")
    iterated = rope_tables(positions, theta=theta, head_dim=head_dim, kind="iterated")
    for ours, theirs in zip(iterated, exact, strict=True):
        error = np.abs(ours - theirs).max(axis=1)
        assert ours.dtype == np.float32
        # At position 3 the angle is off by at most 6e-8 (kernels.md section 4); each of the head_dim/2 roundings
        # adds at most 2^-24 of the angle, so that the error grows with the position and no faster.
        assert error[:4].max() < 2.5e-7
        assert (error <= 2.0**-24 * (1 + np.arange(512) * head_dim / 2)).all()


def test_the_recurrence_is_ggmls() -> None:
    """Float32 at every step: angle times powf(theta, -2/d), not a power of its own."""
    _, sin = rope_tables(np.array([7]), theta=1e6, head_dim=8, kind="iterated")
    scale = np.float32(1e6) ** np.float32(-0.25)
    angle = np.float32(7)
    for pair in range(4):
        # libm's sinf is within one unit in the last place of the correctly rounded sine.
        assert sin[0, pair] == pytest.approx(np.sin(np.float64(angle)), rel=2.0**-23)
        angle = np.float32(angle * scale)


def test_position_zero_does_not_rotate() -> None:
    for kind in ("closed-form", "iterated"):
        cos, sin = rope_tables(np.array([0]), theta=1e6, head_dim=64, kind=kind)
        assert (cos == 1).all()
        assert (sin == 0).all()
