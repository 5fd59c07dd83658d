"""One matrix is packed once, whoever asks for it, and no longer held than by those who asked."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import random_values, tiny_checkpoint, with_tensor

from aprjax.bisect import lockstep
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.patching import PatchedModel
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.loading import head_tensor, load_layer
from aprjax.qwen2.modules import PackedWeight

NAME = "model.layers.1.mlp.gate_proj.weight"
# Seven matrices in each of the three layers, and the head.
MATRICES = 3 * 7 + 1


@pytest.fixture(scope="module")
def ref() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def model(ref: Checkpoint) -> Checkpoint:
    return with_tensor(ref, NAME, 2 * np.array(ref.tensors[NAME].decode()))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the matrices that are packed, as it happens."""
    names: list[str] = []
    real: Callable[[EncodedTensor], PackedWeight] = lockstep.pack_and_release

    def counted(tensor: EncodedTensor) -> PackedWeight:
        names.append(tensor.name)
        return real(tensor)

    monkeypatch.setattr(lockstep, "pack_and_release", counted)
    return names


def test_files_that_differ_everywhere_are_packed_once_each(ref: Checkpoint, packed: list[str]) -> None:
    # `attribute` has three networks on two files: the base and the reference are one file by two arithmetics.
    other = tiny_checkpoint(values=random_values(ref.config, seed=1))
    weights = WeightSource(lambda name: False)
    sides = [(ref, "float32"), (ref, "llama.cpp"), (other, "llama.cpp")]
    held = [PatchedModel(Runner(file, preset(name)), [3, 5], [1], weights) for file, name in sides]
    assert len(packed) == 2 * MATRICES
    assert held[0].head is held[1].head
    assert held[0].head is not held[2].head
    # A config key put right (`locate`) or a choice exchanged (`attribute`) makes no third copy either.
    config = replace(other.config, rope_theta=1e4)
    PatchedModel(Runner(replace(other, config=config), preset("llama.cpp")), [3, 5], [1], weights)
    assert len(packed) == 2 * MATRICES


def test_equal_bytes_are_packed_once_for_both_files(ref: Checkpoint, model: Checkpoint, packed: list[str]) -> None:
    weights = WeightSource(lambda name: name != NAME)
    held = [load_layer(side, 1, weights) for side in (ref, model)]
    assert sorted(packed) == sorted([*{name for name in packed if name != NAME}, NAME, NAME])
    # Each file's own values, and not those of whoever asked first.
    gates = [jax.tree.leaves(layer.mlp.gate_proj.weight) for layer in held]
    assert all(np.array_equal(twice, 2 * once) for once, twice in zip(*gates, strict=True))
    assert held[0].mlp.up_proj.weight is held[1].mlp.up_proj.weight


@pytest.mark.parametrize("same", [True, False])
def test_what_nobody_holds_is_let_go(ref: Checkpoint, packed: list[str], same: bool) -> None:
    weights = WeightSource(lambda name: same)
    first = weights(head_tensor(ref))
    assert weights(head_tensor(ref)) is first
    del first
    gc.collect()
    again = weights(head_tensor(ref))
    assert weights(head_tensor(ref)) is again
    assert len(packed) == 2
