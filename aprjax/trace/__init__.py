"""Traces: what a side computed, by layer and stage, kept with all that makes it comparable."""

from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, STAGE_INPUTS, Stage, Tap
from aprjax.trace.memory import AnyTrace, MemoryTrace, save
from aprjax.trace.trace import Trace, TraceInfo, TraceWriter

__all__ = [
    "LAYER_STAGES",
    "OUTSIDE",
    "STAGE_INPUTS",
    "AnyTrace",
    "MemoryTrace",
    "Stage",
    "Tap",
    "Trace",
    "TraceInfo",
    "TraceWriter",
    "save",
]
