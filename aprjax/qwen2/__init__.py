"""The model: `Qwen2`, its `Arithmetic`, its stages. Importing this package imports jax and flax."""

from aprjax.qwen2.arithmetic import PRESETS, Arithmetic, UnknownArithmetic, preset
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, STAGE_INPUTS, Stage, Tap

__all__ = [
    "LAYER_STAGES",
    "OUTSIDE",
    "PRESETS",
    "STAGE_INPUTS",
    "Arithmetic",
    "Stage",
    "Tap",
    "UnknownArithmetic",
    "preset",
]
