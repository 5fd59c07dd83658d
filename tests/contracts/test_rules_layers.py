"""Layer parity: fourteen steps, their stages, and their tolerances."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from contract_sides import MadeUpBench, contract_of, outcome
from tiny import CONFIG

from aprjax.bisect.lockstep import LayerPair
from aprjax.bisect.report import Verdict
from aprjax.contracts.check.traced_pass import _STEPS, Observer, TracedPass
from aprjax.contracts.types import Status
from aprjax.qwen2.stages import LAYER_STAGES, Stage

STEPS = contract_of("APRJAX-LAYER-001").layer_steps


def observed(change: dict[Stage, tuple[int, float]]) -> MadeUpBench:
    """One layer whose local values differ from the reference's by so much at (channel)."""
    widths = {
        Stage.QKV_BIAS: (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim,
        Stage.FFN_GATE: CONFIG.intermediate_size,
    }
    generator = np.random.default_rng(0)
    ref = {stage: generator.normal(size=(3, widths.get(stage, 256))).astype(np.float32) for stage in LAYER_STAGES}
    local = {stage: value.copy() for stage, value in ref.items()}
    for stage, (channel, amount) in change.items():
        local[stage][2, channel] += amount
    observer = Observer(CONFIG, STEPS)
    observer(LayerPair(0, ref, ref, local, None, lambda: ref))
    report = SimpleNamespace(
        verdict=Verdict.AGREE,
        first_divergence=None,
        layers=(1,),
        prompt=SimpleNamespace(name="direct"),
        findings=(),
    )
    one = TracedPass(report, observer.spreads, observer.uses, "layers-direct.json")  # type: ignore[arg-type]
    return MadeUpBench(traced=lambda name: one)


def test_every_step_has_a_stage() -> None:
    assert [step.name for step in STEPS] == list(_STEPS)
    assert len(STEPS) == 14
    assert {stage for stages in _STEPS.values() for stage in stages} <= set(LAYER_STAGES)


def test_steps_within_and_beyond_tolerance() -> None:
    assert outcome(observed({}), "APRJAX-LAYER-001").status is Status.PASS
    assert outcome(observed({Stage.FFN_NORM: (5, 9e-5)}), "APRJAX-LAYER-001").status is Status.PASS
    found = outcome(observed({Stage.FFN_NORM: (5, 0.1)}), "APRJAX-LAYER-001")
    assert found.status is Status.FAIL
    assert "layer 0, position 2, channel 5" in found.reason
    assert [name for name, use in found.measured.items() if use > 1] == ["ffn_norm"]


def test_q_k_and_v_are_told_apart() -> None:
    for step, channel in (("q_proj", 0), ("k_proj", 256), ("v_proj", 256 + 128)):
        found = outcome(observed({Stage.QKV_BIAS: (channel, 0.5)}), "APRJAX-LAYER-001")
        assert [name for name, use in found.measured.items() if use > 1] == [step]
        assert f"channel {channel} " in found.reason


def test_a_value_that_is_no_number_fails() -> None:
    found = outcome(observed({Stage.FFN_GATE: (1, math.nan)}), "APRJAX-LAYER-001")
    assert found.status is Status.FAIL
    assert "gate_proj" in found.reason
