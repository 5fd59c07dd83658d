"""`altered`: what is changed is changed, nothing else is, and nobody can take the result for the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint, write_tiny

import aprjax
from aprjax.blocks import encode
from aprjax.checkpoint.types import Checkpoint, CheckpointError

GATE, UP, BIAS = (
    f"model.layers.1.{name}" for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "self_attn.k_proj.bias")
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_tiny(tmp_path_factory.mktemp("altered") / "tiny.apr", tiny_checkpoint(types={"": "Q4_K"}))


def test_values_are_encoded_as_the_tensor_was(checkpoint: Checkpoint) -> None:
    changed = aprjax.altered(checkpoint, {BIAS: np.zeros(128), GATE: 2 * checkpoint.tensors[GATE].decode()})
    assert changed.tensors[GATE].block_type == "Q4_K"
    np.testing.assert_array_equal(changed.tensors[GATE].data, encode("Q4_K", 2 * checkpoint.tensors[GATE].decode()))
    assert not changed.tensors[BIAS].decode().any()
    assert checkpoint.tensors[BIAS].decode().any()
    same = set(checkpoint.tensors) - {GATE, BIAS}
    assert all(changed.tensors[name] is checkpoint.tensors[name] for name in same)


def test_an_encoded_tensor_keeps_its_bytes_under_the_new_name(checkpoint: Checkpoint) -> None:
    changed = aprjax.altered(checkpoint, {GATE: checkpoint.tensors[UP]})
    assert changed.tensors[GATE].name == GATE
    assert changed.tensors[GATE].sha256() == checkpoint.tensors[UP].sha256()


def test_the_config_takes_keys(checkpoint: Checkpoint) -> None:
    changed = aprjax.altered(checkpoint, rope_theta=1e4, rms_norm_eps=1e-5)
    assert changed.config == replace(checkpoint.config, rope_theta=1e4, rms_norm_eps=1e-5)


def test_it_is_no_file(checkpoint: Checkpoint) -> None:
    digests = [
        changed.sha256()
        for changed in (
            checkpoint,
            aprjax.altered(checkpoint, {GATE: checkpoint.tensors[UP]}),
            aprjax.altered(checkpoint, {UP: checkpoint.tensors[GATE]}),
            aprjax.altered(checkpoint, rope_theta=1e4),
            aprjax.altered(checkpoint, rope_theta=2e4),
        )
    ]
    assert len(set(digests)) == len(digests)
    changed = aprjax.altered(checkpoint, rope_theta=1e4)
    assert changed.sha256() == digests[3]
    assert changed.path == Path("tiny.apr (altered)")
    assert changed.files == ()


def test_what_cannot_be_altered_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no key 'theta'.*rope_theta"):
        aprjax.altered(checkpoint, theta=1.0)
    with pytest.raises(CheckpointError, match=r"nothing.*no such tensor"):
        aprjax.altered(checkpoint, {"nothing": np.zeros(1)})
    with pytest.raises(CheckpointError, match=r"expected the shape \[128\], found \[127\]"):
        aprjax.altered(checkpoint, {BIAS: np.zeros(127)})


def test_a_checkpoint_shows_itself_in_a_few_lines(checkpoint: Checkpoint) -> None:
    assert repr(checkpoint) == f"<Checkpoint tiny.apr: apr, {len(checkpoint.tensors)} tensors>"
    hostile = replace(checkpoint, path=Path("<b>&.gguf"))
    html = hostile._repr_html_()
    assert "&lt;b&gt;&amp;.gguf" in html
    assert "Q4_K" in html


def test_files_says_what_was_altered_and_draws_it(checkpoint: Checkpoint) -> None:
    changed = aprjax.altered(checkpoint, {GATE: checkpoint.tensors[UP], UP: checkpoint.tensors[GATE]})
    report = aprjax.files(changed, checkpoint)
    assert sorted(difference.name for difference in report.files.tensors) == [GATE, UP]
    assert {difference.explanation_id for difference in report.files.tensors} == {"another-tensor"}
    assert report.plot()._repr_png_().startswith(b"\x89PNG")
    assert repr(report).startswith("<FilesComparison: divergence; ")
