"""What happened to a tensor: each everyday accident is named, and none is named for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor

from aprjax.bisect.files import compare_files
from aprjax.checkpoint.types import Checkpoint

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    return tiny_checkpoint(types={"": "Q4_K", "lm_head": "Q6_K"})


def explained(reference: Checkpoint, model: Checkpoint, name: str) -> str:
    report = compare_files(model, reference)
    assert [t.name for t in report.tensors] == [name]
    return report.tensors[0].explanation


def bytes_changed(reference: Checkpoint, name: str, change: Callable[[np.ndarray], None]) -> Checkpoint:
    from dataclasses import replace

    old = reference.tensors[name]
    size = {"Q4_K": 144, "Q6_K": 210}[old.block_type]
    data = old.data.copy()
    change(data.reshape(-1, size))
    return replace(reference, tensors={**reference.tensors, name: replace(old, data=data)})


def interleave(blocks: np.ndarray) -> None:
    """Neighbours packed in one byte, instead of elements 32 apart (PAR-001)."""
    codes = blocks[:, 16:].reshape(-1, 4, 32)
    values = np.concatenate([codes & 15, codes >> 4], axis=2)
    blocks[:, 16:] = (values[:, :, 0::2] | (values[:, :, 1::2] << 4)).reshape(len(blocks), -1)


def test_a_clean_pair_has_no_difference(reference: Checkpoint) -> None:
    report = compare_files(reference, tiny_checkpoint(types={"": "Q4_K", "lm_head": "Q6_K"}))
    assert report.identical
    assert report.sentence().startswith("The two files hold byte-identical blocks in all 39 tensors, and equal configs")
    assert report.findings() == ()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (O_PROJ, lambda v: v.T, "transposed"),
        (HEAD, lambda v: np.roll(v, 1, axis=0), "shifted down by one row"),
        (HEAD, lambda v: np.roll(v, -1, axis=0), "shifted up by one row"),
        (GATE, lambda v: v[:, ::-1], "with every row reversed"),
        (GATE, lambda v: v.T.reshape(v.shape), "with its two dimensions exchanged"),
        (GATE, np.zeros_like, "all zero"),
        (BIAS, np.zeros_like, "all zero"),
        (BIAS, lambda v: v * np.float32(1.5), "times 1.5"),
        (O_PROJ, lambda v: v * np.float32(-1), "times -1"),
        (UP, lambda v: v + np.random.default_rng(0).normal(0, v.std(), v.shape), "the decoded values differ"),
    ],
)
def test_changed_values_are_explained(
    reference: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    values = change(reference.tensors[name].decode())
    kept = "F32" if values.ndim == 2 else None
    assert words in explained(reference, with_tensor(reference, name, values, kept), name)


def test_a_single_changed_row_is_named(reference: Checkpoint) -> None:
    name = "model.embed_tokens.weight"
    values = reference.tensors[name].decode()
    values[37] = 0.5
    assert "row 37 alone" in explained(reference, with_tensor(reference, name, values, "F32"), name)


def test_nan_is_located(reference: Checkpoint) -> None:
    values = reference.tensors[GATE].decode()
    values[3, 9] = np.nan
    text = explained(reference, with_tensor(reference, GATE, values, "F32"), GATE)
    assert "not finite (first: nan at element 777)" in text


def test_another_tensor_under_this_name_is_recognised(reference: Checkpoint) -> None:
    from dataclasses import replace

    swapped = {**reference.tensors, GATE: replace(reference.tensors[UP], name=GATE)}
    assert f"the model holds the reference's {UP}" in explained(reference, replace(reference, tensors=swapped), GATE)


def test_another_tensor_is_recognised_in_another_block_type_too(reference: Checkpoint) -> None:
    model = with_tensor(reference, GATE, reference.tensors[UP].decode(), "F32")
    assert f"the model holds the reference's {UP}" in explained(reference, model, GATE)


def test_fields_of_the_blocks_are_told_apart(reference: Checkpoint) -> None:
    def cleared(blocks: np.ndarray) -> None:
        blocks[:, 4:16] &= 0x3F

    def doubled(blocks: np.ndarray) -> None:
        blocks[:, 1] += 4  # exponent of d

    for change, words in (
        (interleave, "nibble order"),
        (cleared, "only the sub-block scales of the Q4_K blocks differ, bits of it cleared"),
        (doubled, "only the block scale (d, dmin) of the Q4_K blocks differ"),
    ):
        assert words in explained(reference, bytes_changed(reference, GATE, change), GATE)


def test_other_block_types_of_equal_values_are_no_difference_in_value(reference: Checkpoint) -> None:
    values = {name: tensor.decode() for name, tensor in reference.tensors.items()}
    report = compare_files(tiny_checkpoint(values=values), reference)
    assert all(t.same_values for t in report.tensors)
    assert len(report.tensors) == 3 * 7 + 2
    assert [f.id for f in report.findings()] == ["block-types-differ"]
    assert report.findings()[0].severity == "info"


def test_missing_tensors_and_other_shapes_are_named(reference: Checkpoint) -> None:
    from dataclasses import replace

    without = {name: t for name, t in reference.tensors.items() if name != BIAS}
    assert "missing in the model" in explained(reference, replace(reference, tensors=without), BIAS)
    short = with_tensor(reference, GATE, np.zeros((256, CONFIG.hidden_size)))
    assert "shape [256, 256] in the model, [512, 256] in the reference" in explained(reference, short, GATE)


def test_configs_are_compared_key_by_key(reference: Checkpoint) -> None:
    from dataclasses import replace

    other = replace(reference, path=Path("x"), config=replace(CONFIG, rope_theta=1e4, max_position_embeddings=9))
    report = compare_files(other, reference)
    assert report.config == {"rope_theta": (1e4, 1e6), "max_position_embeddings": (9, 512)}
    assert {f.severity for f in report.findings()} == {"error", "info"}
    assert not report.dimensions
    assert "configs differ in max_position_embeddings, rope_theta" in report.sentence()


@pytest.mark.parametrize("step", [32, 64])
def test_misplaced_bytes_are_named_where_they_decode_to_nan(reference: Checkpoint, step: int) -> None:
    """A scale that is no scale is NaN somewhere: that is what follows from the offset, not what happened."""
    from dataclasses import replace

    old = reference.tensors[GATE]
    moved = replace(old, data=np.concatenate([old.data[step:], np.zeros(step, np.uint8)]))
    with np.errstate(all="ignore"):
        assert not np.isfinite(moved.decode()).all()
    text = explained(reference, replace(reference, tensors={**reference.tensors, GATE: moved}), GATE)
    assert f"from {step} bytes further on" in text


def test_bytes_of_another_type_are_named_where_they_decode_to_nan(reference: Checkpoint) -> None:
    from aprjax.blocks import dequantize

    old = reference.tensors[GATE]
    with np.errstate(all="ignore"):
        values = dequantize("Q4_0", old.data, old.shape)
    assert not np.isfinite(values).all()
    text = explained(reference, with_tensor(reference, GATE, values, "F32"), GATE)
    assert "the reference's Q4_K bytes decoded as Q4_0" in text


def test_a_big_endian_bias_is_named_where_it_is_nan(reference: Checkpoint) -> None:
    from dataclasses import replace

    old = reference.tensors[BIAS]
    swapped = replace(old, data=old.data.reshape(-1, 4)[:, ::-1].reshape(-1).copy())
    text = explained(reference, replace(reference, tensors={**reference.tensors, BIAS: swapped}), BIAS)
    assert "the reference's bytes in reverse order" in text


@pytest.mark.parametrize("through", ["Q4_0", "Q5_1"])
def test_a_passage_through_a_coarser_type_is_told_from_rounding(reference: Checkpoint, through: str) -> None:
    from aprjax.blocks import dequantize, encode

    rough = dequantize(through, encode(through, reference.tensors[UP].decode()), reference.tensors[UP].shape)
    text = explained(reference, with_tensor(reference, UP, rough), UP)
    assert f"after a passage through {through}" in text
