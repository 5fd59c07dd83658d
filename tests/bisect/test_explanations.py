"""The search for explanations: every planted accident is the first explanation, and nothing else has any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import planted_tensors as planted
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_tensors import EMBEDDING, GATE, UP, Accident, checkpoint, stored, tensor

from aprjax.bisect.files import compare_files
from aprjax.bisect.files.report import TensorDifference
from aprjax.blocks import FORMATS, encode
from aprjax.checkpoint.types import EncodedTensor

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
one = settings(max_examples=1, deadline=None, suppress_health_check=SLOW, database=None)
many = settings(max_examples=12, deadline=None, suppress_health_check=SLOW, database=None)
few = settings(max_examples=2, deadline=None, suppress_health_check=SLOW, database=None)
seeds = st.integers(0, 2**32 - 1)


def found(ours: EncodedTensor, theirs: EncodedTensor, *others: EncodedTensor) -> TensorDifference:
    """The one difference of two checkpoints that have `others` in common."""
    report = compare_files(checkpoint(*others, ours), checkpoint(*others, theirs))
    assert [t.name for t in report.tensors] == [ours.name]
    return report.tensors[0]


def check_accident(accident: Accident, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    theirs = tensor(accident.name, kind, rng)
    difference = found(accident.plant(theirs, rng), theirs)
    assert difference.explanation_id == accident.id, difference
    assert difference.residual is not None
    # Stored losslessly, so that only a fitted factor can leave anything.
    assert difference.residual <= (1e-6 if accident.id in {"scaled", "shifted"} else 0.0)


@pytest.mark.parametrize("accident", planted.GENERAL_ACCIDENTS, ids=lambda accident: accident.id)
@one
@given(seed=seeds, data=st.data())
def test_an_accident_is_its_own_first_explanation(accident: Accident, seed: int, data: st.DataObject) -> None:
    check_accident(accident, seed, data.draw(st.sampled_from(accident.kinds)))


@pytest.mark.thorough
@pytest.mark.parametrize("accident", planted.GENERAL_ACCIDENTS, ids=lambda accident: accident.id)
@many
@given(seed=seeds, data=st.data())
def test_so_it_is_for_every_block_type(accident: Accident, seed: int, data: st.DataObject) -> None:
    check_accident(accident, seed, data.draw(st.sampled_from(accident.kinds)))


@pytest.mark.parametrize("accident", planted.FIELD_ACCIDENTS, ids=lambda accident: f"{accident.id}-{accident.kinds[0]}")
@pytest.mark.parametrize("decoded", [False, True], ids=["bytes", "values"])
def test_a_field_of_the_blocks_is_named(accident: Accident, decoded: bool) -> None:
    rng = np.random.default_rng(0)
    theirs = tensor(GATE, accident.kinds[0], rng)
    ours = accident.plant(theirs, rng)
    difference = found(stored(ours, ours.decode()) if decoded else ours, theirs)
    assert (difference.explanation_id, difference.residual) == (accident.id, 0.0)
    assert difference.basis == ("all values" if decoded else "all bytes")


@few
@given(seed=seeds, kind=st.sampled_from(planted.EVERY), other=st.sampled_from(planted.EVERY))
def test_unrelated_values_have_no_explanation(seed: int, kind: str, other: str) -> None:
    rng = np.random.default_rng(seed)
    difference = found(tensor(GATE, kind, rng), tensor(GATE, other, rng), tensor(UP, kind, rng))
    assert difference.explanation_id == ""
    assert difference.residual is None
    assert "none of" in difference.explanation
    assert {"transposed", "scaled"} & {name for name, _ in difference.excluded} or len(difference.excluded) > 4


@few
@given(seed=seeds, kind=st.sampled_from(("Q8_0", "Q4_K", "Q6_K")), pick=st.sampled_from(("rows", "rope", "heads", "T")))
def test_a_rearranged_tensor_is_recognised_through_another_rounding(seed: int, kind: str, pick: str) -> None:
    """Values that were never on the reference's grid: rearranged first, quantized afterwards, on both sides."""
    rng = np.random.default_rng(seed)
    name = planted.O if pick == "T" else planted.Q
    values = rng.normal(0, 0.05, planted.SHAPES[name]).astype(np.float32)
    change, wanted = {
        "rows": (lambda v: np.roll(v, 1, axis=0), "rows-shifted"),
        "rope": (planted.interleaved, "rotary-interleaved"),
        "heads": (planted.in_order([1, 0, 3, 2]), "heads-permuted"),
        "T": (lambda v: v.T, "transposed"),
    }[pick]
    theirs = EncodedTensor(name, values.shape, "Q4_K", encode("Q4_K", values))
    again = found(stored(theirs, change(theirs.decode()), kind), theirs)
    assert (again.explanation_id, again.residual) == (wanted, 0.0)
    assert again.parameters.get("encoded_as", kind) == kind
    difference = found(stored(theirs, change(values), kind), theirs)
    assert difference.explanation_id == wanted, difference
    assert difference.tolerance is not None
    assert difference.residual is not None
    assert 0 <= difference.residual <= difference.tolerance < 0.3


@few
@given(seed=seeds, through=st.sampled_from(("F16", "BF16", "Q8_0", "Q4_K", "AprQ4")))
def test_a_passage_through_another_type_is_named(seed: int, through: str) -> None:
    rng = np.random.default_rng(seed)
    theirs = tensor(GATE, "Q6_K", rng)
    values = theirs.decode()
    passed = EncodedTensor(GATE, values.shape, through, encode(through, values)).decode()
    for kind in ("F32", "Q6_K"):
        difference = found(stored(theirs, passed, kind), theirs)
        assert difference.explanation_id == "double-quantized"
        assert difference.parameters["through"] == through
        assert difference.residual == 0.0


def test_the_original_of_a_quantization_is_no_fault_of_the_model() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.05, planted.SHAPES[GATE]).astype(np.float32)
    original = EncodedTensor(GATE, values.shape, "F32", encode("F32", values))
    assert found(original, stored(original, values, "Q4_K")).explanation_id == "quantized-from-model"
    # By another quantizer: the blocks are not ours, the distance is a rounding's.
    blunt = np.round(values / 0.01) * 0.01
    assert found(stored(original, blunt, "Q8_0"), stored(original, values, "Q4_K")).explanation_id == "rounded"


def test_one_strange_row_is_not_taken_for_rounding() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0, 0.05, (2000, 256)).astype(np.float32)
    theirs = EncodedTensor(EMBEDDING, values.shape, "Q4_K", encode("Q4_K", values))
    values[137] = rng.normal(0, 0.05, 256)
    difference = found(stored(theirs, values, "Q8_0"), theirs)
    assert difference.rel_l2 is not None
    assert difference.tolerance is not None
    assert difference.rel_l2 < difference.tolerance
    assert difference.explanation_id == ""
    assert difference.worst_rows[0].row == 137


@pytest.mark.parametrize(
    ("kind", "read_as"), [("F16", "BF16"), ("BF16", "F16"), ("Q4_0", "IQ4_NL"), ("IQ4_NL", "Q4_0"), ("Q4_0", "AprQ4")]
)
@pytest.mark.parametrize("decoded", [False, True], ids=["bytes", "values"])
def test_a_misread_block_type_is_named(kind: str, read_as: str, decoded: bool) -> None:
    theirs = tensor(GATE, kind, np.random.default_rng(5))
    ours = replace(theirs, block_type=read_as)
    with np.errstate(all="ignore"):
        difference = found(stored(ours, ours.decode()) if decoded else ours, theirs)
    assert difference.explanation_id == "type-misread"
    assert difference.parameters == {"read_as": read_as, "type": kind}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_bytes_in_reverse_order_are_recognised(kind: str) -> None:
    theirs = tensor(GATE, kind, np.random.default_rng(6))
    width = FORMATS[kind].block_bytes
    # Values that stay finite with their bytes in reverse order: otherwise the damage itself is the finding.
    data = np.resize(np.arange(1, 60, dtype=np.uint8), theirs.data.size)
    theirs = replace(theirs, data=data)
    ours = replace(theirs, data=np.ascontiguousarray(data.reshape(-1, width)[:, ::-1]).reshape(-1))
    assert found(ours, theirs).explanation_id == "byte-order"


def test_two_tensors_that_changed_places() -> None:
    rng = np.random.default_rng(7)
    gate, up = tensor(GATE, "Q4_K", rng), tensor(UP, "Q4_K", rng)
    swapped = (replace(up, name=GATE), replace(gate, name=UP))
    report = compare_files(checkpoint(*swapped), checkpoint(gate, up))
    assert [t.parameters for t in report.tensors] == [
        {"tensor": UP, "exchanged": True},
        {"tensor": GATE, "exchanged": True},
    ]
    # Quantized again after the exchange.
    again = stored(gate, up.decode(), "Q8_0")
    difference = found(again, gate, up)
    assert (difference.explanation_id, difference.parameters["exchanged"]) == ("another-tensor", False)


@pytest.mark.parametrize(
    ("name", "change", "wanted", "not_only"),
    [
        # All zero: also the reference times nought, and any order of zeros.
        (GATE, lambda v: v * 0, "zeroed", "scaled"),
        # A cyclic shift is a permutation of rows as well.
        (EMBEDDING, lambda v: np.roll(v, 1, axis=0), "rows-shifted", "rows-permuted"),
        # Heads in reverse order are rows in another order.
        (planted.Q, planted.in_order([3, 2, 1, 0]), "heads-permuted", "rows-permuted"),
        # One factor for all is a factor for each row.
        (GATE, lambda v: v * np.float32(2), "scaled", "scaled by row"),
    ],
)
def test_of_two_explanations_the_simpler_is_given(
    name: str, change: Callable[[np.ndarray], np.ndarray], wanted: str, not_only: str
) -> None:
    theirs = tensor(name, "Q8_0", np.random.default_rng(8))
    difference = found(stored(theirs, change(theirs.decode())), theirs)
    assert difference.explanation_id == wanted != not_only
    assert "of its own" not in difference.explanation


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda v: np.roll(v, 1), "rows-shifted"),
        (lambda v: v[::-1], "reversed"),
        (planted.interleaved, "rotary-interleaved"),
        (planted.in_order([1, 0]), "heads-permuted"),
        (lambda v: v + np.float32(1), "shifted"),
        (lambda v: v * np.float32(8), "scaled"),
        (lambda v: np.where(np.arange(v.size) < 3, 0, v), "zeroed"),
    ],
)
def test_vectors_have_explanations_too(kind: str, change: Callable[[np.ndarray], np.ndarray], wanted: str) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    theirs = tensor(name, kind, np.random.default_rng(9), (128,))
    difference = found(stored(theirs, change(theirs.decode())), theirs)
    assert difference.explanation_id == wanted
    assert "rows" not in difference.explanation


def test_a_shape_written_the_other_way_round() -> None:
    theirs = tensor(GATE, "F32", np.random.default_rng(10))
    same_bytes = replace(theirs, shape=(512, 256))
    difference = found(same_bytes, theirs)
    assert difference.explanation_id == "dimensions-exchanged"
    assert "shape [512, 256] in the model, [256, 512] in the reference: " in difference.explanation
    assert found(stored(theirs, theirs.decode().T), theirs).explanation_id == "transposed"
    assert found(tensor(GATE, "F32", np.random.default_rng(11), (512, 256)), theirs).explanation_id == ""
