"""What a trace lacks, in words that a person reads at one glance."""

from __future__ import annotations

import numpy as np
import pytest

from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace.lacking import NEVER_YIELDS, unmeasured_part
from aprjax.trace.memory import MemoryTrace
from aprjax.trace.trace import TraceInfo

LAYERS = 5
OUTSIDE_STAGES = tuple(stage for stage in Stage if stage not in LAYER_STAGES)
EVERY_PLACE = tuple((OUTSIDE, stage) for stage in OUTSIDE_STAGES) + tuple(
    (layer, stage) for layer in range(LAYERS) for stage in LAYER_STAGES
)


def said(places: set[tuple[int, Stage]], **engine: str) -> str:
    info = TraceInfo("m.gguf", "0" * 64, "gguf", "float32", (1, 2), (0, 1), (0, 1), engine=engine)
    values = {place: np.zeros((2, 1), np.float32) for place in EVERY_PLACE if place in places}
    sentence = unmeasured_part(MemoryTrace(info, values), LAYERS, "the trace")
    return sentence.removeprefix("the trace lacks ").partition("; record it again")[0]


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ([], ""),
        ([(3, Stage.FFN_SILU)], "1 value, which was not measured: ffn_silu of layer 3"),
        (
            [(OUTSIDE, Stage.LM_HEAD), *((layer, Stage.FFN_OUT) for layer in (1, 2, 3))],
            "4 values, which were not measured: ffn_out of layers 1 to 3; lm_head",
        ),
        (
            [(layer, stage) for layer in range(LAYERS) for stage in (Stage.FFN_OUT, Stage.ATTN_NORM)],
            "10 values, which were not measured: attn_norm and ffn_out of all layers",
        ),
        (
            [(2, stage) for stage in LAYER_STAGES] + [(0, Stage.FFN_OUT), (4, Stage.FFN_OUT)],
            "19 values, which were not measured: everything of layer 2; ffn_out of layers 0, 4",
        ),
    ],
)
def test_stages_that_lack_in_the_same_layers_are_said_together(missing: list, words: str) -> None:
    assert said(set(EVERY_PLACE) - set(missing)) == words


def test_of_a_trace_that_holds_little_is_said_what_it_holds() -> None:
    gates = {(layer, stage) for layer in range(LAYERS) for stage in (Stage.FFN_GATE, Stage.FFN_UP)}
    assert said(gates) == "78 values, which were not measured: all but ffn_gate and ffn_up of all layers"
    assert said({(4, stage) for stage in LAYER_STAGES}).endswith("not measured: all but layer 4")
    assert said(set()) == "88 values, which were not measured: all"


def test_what_the_engine_never_yields_is_not_in_the_sentence() -> None:
    without = {(layer, stage) for layer, stage in EVERY_PLACE if stage is not Stage.ATTN_SCORES}
    assert said(without, **{NEVER_YIELDS: "attn_scores"}) == ""
    assert said(without - {(1, Stage.FFN_UP)}, **{NEVER_YIELDS: "attn_scores"}).endswith("measured: ffn_up of layer 1")
