"""Forward parity: the band, equal counts, every slot, and what the band cannot see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from contract_sides import MadeUpBench, outcome, statuses, write_pair
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.report import Verdict
from aprjax.checkpoint import open_checkpoint
from aprjax.contracts.check.traced_pass import SELECTIONS, SLOTS, Spread, TracedPass
from aprjax.contracts.types import Status

LAYERS = 28


def made_up_pass(**ratios: dict[int, float]) -> TracedPass:
    """A pass of 28 layers whose standard deviations are 1 on the reference's side, and as given on the model's."""
    spreads = {
        (layer, slot, selection): Spread(ratios.get(slot, {}).get(layer, 1.0), 1.0, (7, 7))
        for layer in range(LAYERS)
        for slot in SLOTS
        for selection in SELECTIONS
    }
    report = SimpleNamespace(
        verdict=Verdict.AGREE,
        reason="",
        first_divergence=None,
        layers=(),
        margins=(),
        findings=(),
        prompt=SimpleNamespace(name="direct", positions=tuple(range(7))),
    )
    return TracedPass(report, spreads, {}, "layers-direct.json")  # type: ignore[arg-type]


def bench(one: TracedPass) -> MadeUpBench:
    model = tiny_checkpoint(CONFIG)
    return MadeUpBench(traced=lambda name: one, files_by_side={"model": model, "ref": model})


def test_ratios_in_and_out_of_the_band() -> None:
    band = ("FALSIFY-APR-GGUF-PARITY-001", "FALSIFY-APR-GGUF-PARITY-002", "FALSIFY-FFN-GGUF-003")
    gate = "FALSIFY-APR-GGUF-PARITY-003"
    assert set(statuses(bench(made_up_pass()), *band, gate).values()) == {"pass"}
    # Upstream's story: 18.23 in layer 3, and 1.36 at its gate, which the narrow band lets pass.
    story = bench(made_up_pass(ffn_swigl={3: 18.23}, ffn_gate={3: 1.36}))
    assert set(statuses(story, *band).values()) == {"fail"}
    assert statuses(story, gate) == {gate: "pass"}
    elsewhere = bench(made_up_pass(ffn_swigl={5: 0.49}, ffn_gate={3: 1.41}))
    found = statuses(elsewhere, *band, gate)
    assert found == {band[0]: "fail", band[1]: "pass", band[2]: "pass", gate: "fail"}


def test_a_ratio_that_is_no_number_fails() -> None:
    one = made_up_pass()
    one.spreads[7, "ffn_swigl", "last"] = Spread(None, 1.0, (7, 7))
    found = outcome(bench(one), "FALSIFY-APR-GGUF-PARITY-001")
    assert found.status is Status.FAIL
    assert "no finite value" in found.reason


def test_a_small_model_has_no_layer_three() -> None:
    one = made_up_pass()
    for key in [key for key in one.spreads if key[0] > 2]:
        del one.spreads[key]
    assert statuses(bench(one), "FALSIFY-APR-GGUF-PARITY-002") == {"FALSIFY-APR-GGUF-PARITY-002": "unmeasured"}


def test_unequal_counts_are_no_ratio() -> None:
    one = made_up_pass()
    assert statuses(bench(one), "FALSIFY-APR-GGUF-PARITY-007") == {"FALSIFY-APR-GGUF-PARITY-007": "pass"}
    # All tokens on one side, the last on the other: the ratio of 18.23 was such a one.
    one.spreads[3, "ffn_swigl", "all"] = Spread(1.2216, 0.0670, (132_608, 18_944))
    assert one.ratios("ffn_swigl", "all")[3] is None
    found = outcome(bench(one), "FALSIFY-APR-GGUF-PARITY-007")
    assert found.status is Status.FAIL
    assert found.measured["unequal_counts"] == 1
    assert outcome(bench(one), "FALSIFY-APR-GGUF-PARITY-001").status is Status.FAIL


def test_every_slot_of_every_layer() -> None:
    one = made_up_pass()
    ids = ("FALSIFY-APR-GGUF-PARITY-006", "FALSIFY-FFN-GGUF-001", "FALSIFY-SUB-FFN-005")
    inner = CONFIG.intermediate_size * 7
    for key, spread in list(one.spreads.items()):
        one.spreads[key] = Spread(spread.model, spread.ref, (inner, inner))
    assert set(statuses(bench(one), *ids, "FALSIFY-SUB-FFN-006").values()) == {"pass"}
    del one.spreads[1, "ffn_silu", "all"]
    assert set(statuses(bench(one), *ids).values()) == {"fail"}
    one.spreads[1, "ffn_silu", "all"] = Spread(1.0, 1.0, (inner, inner // 7))
    assert statuses(bench(one), "FALSIFY-SUB-FFN-006") == {"FALSIFY-SUB-FFN-006": "fail"}


def test_shapes_of_the_stream() -> None:
    one = made_up_pass()
    width = CONFIG.hidden_size * 7
    for key in [key for key in one.spreads if key[0] >= CONFIG.num_layers]:
        del one.spreads[key]
    for layer in range(CONFIG.num_layers):
        one.spreads[layer, "output", "all"] = Spread(1.0, 1.0, (width, width))
    one.report.margins = (None,) * 7  # type: ignore[misc]
    ids = ("FALSIFY-QW2E-006", "FALSIFY-QW2E-007")
    assert set(statuses(bench(one), *ids).values()) == {"pass"}
    one.report.margins = (None,) * 6  # type: ignore[misc]
    del one.spreads[1, "output", "all"]
    assert set(statuses(bench(one), *ids).values()) == {"fail"}


def test_one_slot_standing_out() -> None:
    assert statuses(bench(made_up_pass()), "FALSIFY-SUB-FFN-001") == {"FALSIFY-SUB-FFN-001": "pass"}
    found = outcome(bench(made_up_pass(ffn_swigl={3: 3.1})), "FALSIFY-SUB-FFN-001")
    assert found.status is Status.FAIL
    assert found.measured["layer_3_ffn_swigl_over_median"] == pytest.approx(3.1)


def test_a_drop_within_the_attention() -> None:
    from aprjax.bisect.report import LayerReport, StageReport
    from aprjax.qwen2.stages import LAYER_STAGES

    def with_cosines(after: float) -> MadeUpBench:
        one = made_up_pass()
        stages = {}
        for index, stage in enumerate(LAYER_STAGES):
            distance = SimpleNamespace(cosine=1.0 if index < 4 else after)
            stages[stage] = StageReport(distance, None)  # type: ignore[arg-type]
        one.report.layers = (LayerReport(0, stages),)  # type: ignore[misc]
        return bench(one)

    assert statuses(with_cosines(0.9999), "FALSIFY-ATTN-SUB-004") == {"FALSIFY-ATTN-SUB-004": "pass"}
    found = outcome(with_cosines(0.9966), "FALSIFY-ATTN-SUB-004")
    assert found.status is Status.FAIL
    assert found.measured["drops"] == 1


@pytest.mark.thorough
def test_a_clean_pair_and_a_faulty_one(tmp_path: Path) -> None:
    from aprjax.contracts.check.bench import Bench

    apr, gguf = write_pair(tmp_path)
    ids = tuple(f"APRJAX-FORWARD-00{number}" for number in range(1, 5))
    clean = Bench(str(apr), str(gguf))
    assert set(statuses(clean, *ids).values()) == {"pass"}
    # A norm that is 3 % off in one layer: too little for the band and the cosine, not for the local difference.
    model = open_checkpoint(apr)
    name = "model.layers.1.post_attention_layernorm.weight"
    slight = write_tiny(tmp_path / "slight.apr", with_tensor(model, name, model.tensors[name].decode() * 1.03))
    faulty = Bench(str(slight.path), str(gguf))
    found = outcome(faulty, "APRJAX-FORWARD-001")
    assert found.status is Status.FAIL
    assert "layer 1, ffn_norm" in found.reason
    unseen = statuses(faulty, "FALSIFY-APR-GGUF-PARITY-001", "APRJAX-FORWARD-002")
    assert set(unseen.values()) == {"pass"}
    # Twice the norm: everything sees it.
    gross = write_tiny(tmp_path / "gross.apr", with_tensor(model, name, model.tensors[name].decode() * -3))
    assert set(statuses(Bench(str(gross.path), str(gguf)), *ids[:3]).values()) == {"fail"}
