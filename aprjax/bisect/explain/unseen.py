"""How far an engine's float32 may move a fitted number without leaving anything behind that would show it.

A fit's residual shows the roundings that go their own way from value to value. Those that go the number's way are
fitted away: what is left after them is as small as ever. Three kinds do: a rounding that every value of a position
shares (the scale of a norm), those of the few values that the number hangs on where it hangs on few, and one of the
number itself, or of what an engine makes of it once for all positions (the factor from one rotary frequency to the
next). They can only be counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from aprjax.checkpoint.types import ModelConfig
from aprjax.qwen2.stages import Stage

# Half of float32's last place, relative: what one rounding adds at most.
UNIT = 2.0**-24
NORMS = (Stage.ATTN_NORM, Stage.FFN_NORM, Stage.FINAL_NORM)
# A norm: mean, its sum with epsilon, root, quotient. A softmax has fewer.
_SHARED = 4.0
# Of a value by itself: a rotation's two factors, two products and their sum; a capped score's product, quotient, tanh
# (by one and a half) and product.
_OWN = 4.0


def shared_roundings(stages: Iterable[Stage], config: ModelConfig, positions: int) -> float:
    """Roundings, in units of `UNIT`, that all values of a position may share behind these stages.

    Norms and softmaxes divide by one sum; other stages round every value by itself. A sum of n terms of one sign in
    float32, in whatever order, is off by no more than about root n roundings (N. J. Higham, T. Mary, SIAM J. Sci.
    Comput. 41, 2019); the root of it by half of them.
    """
    total = 0.0
    for stage in stages:
        if stage in NORMS:
            total += _SHARED + 0.5 * math.sqrt(config.hidden_size)
        elif stage is Stage.ATTN_SOFTMAX:
            total += _SHARED + math.sqrt(positions)
    return total


# Of a factor, relative to it: its own rounding, and that of what it was computed from.
FACTOR_ERROR = 2 * UNIT


def of_a_factor(config: ModelConfig, value: float) -> float:
    """Of a factor, in units of `UNIT` relative to it."""
    return FACTOR_ERROR / UNIT


def of_theta(config: ModelConfig, value: float) -> float:
    """Of a rotary base, in units of `UNIT` relative to it.

    llama.cpp (`ggml_rope_cache_init`) goes from one frequency to the next by a factor theta^(-2 / n) in float32: its
    rounding is another theta's, raised to n / 2. Others compute every frequency as a power or as an exponential: four
    roundings (logarithm, exponent, power, reciprocal), which weigh ln(theta) times as much: a base acts through the
    channels that turn slowly, its exponents there being about 1 / ln(theta).
    """
    return max(config.head_dim / 2, 4 * abs(math.log(value)))


def of_stretch(config: ModelConfig, value: float) -> float:
    """Of a factor on positions, in units of `UNIT` relative to it.

    It acts through the fastest channels, the first n / (2 ln theta): so often llama.cpp's factor is multiplied there.
    """
    return 4.0 + config.head_dim / (2 * max(1.0, math.log(config.rope_theta)))


def pushed(
    slopes: Float[np.ndarray, "value parameter"],
    inverse: Float[np.ndarray, "parameter parameter"],
    values: Float[np.ndarray, " value"],
    rows: Float[np.ndarray, " row"],
    shared: Float[np.ndarray, " row"],
) -> Float[np.ndarray, " parameter"]:
    """How far roundings of values, and those that a position's values share, may push a fit's parameters.

    What a position shares goes the parameter's way at worst. Roundings of different values, and what different
    positions share, are independent.

    Args:
        slopes: derivatives of the values by the parameters, every position in units of its own norm.
        inverse: of `slopes.T @ slopes`.
        values: in those units.
        rows: where each position's values begin.
        shared: each position's roundings (`shared_roundings`).
    """
    influence = slopes @ inverse
    alone = np.square(influence * (_OWN * UNIT * values)[:, None]).sum(axis=0)
    together = np.add.reduceat(np.square(influence), rows.astype(np.intp), axis=0)
    return np.sqrt(alone) + np.sqrt((together * np.square(shared * UNIT)[:, None]).sum(axis=0))
