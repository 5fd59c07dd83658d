"""Damaged Hugging Face folders: a checkpoint or a message, never anything else."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzzing import damages, open_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import TINY, tiny_tensors, write_tiny_gguf

from aprjax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from aprjax.checkpoint.convert import convert


def damage_many(folder: Path, examples: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    ends: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damage=damages(header, len(content)))
    def run(damage: Any) -> None:
        ends[type(open_damaged(path, damage(content), opened=folder)).__name__] += 1

    run()
    assert ends["Checkpoint"] > 0
    assert ends["CheckpointError"] > examples // 10


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    small = replace(TINY, hidden_size=32, num_layers=1, head_dim=8, intermediate_size=64)
    convert(write_tiny_gguf(tmp_path / "small.gguf", tiny_tensors(small), config=small), tmp_path / "small")
    return tmp_path / "small"


def test_damaged_headers(small_folder: Path) -> None:
    damage_many(small_folder, 500)


# Needs no model, but takes minutes: part of `make test-real` for its length.
@pytest.mark.real_model
def test_damaged_headers_at_length(small_folder: Path) -> None:
    damage_many(small_folder, 10_000)


def test_truncated_anywhere_is_refused(small_folder: Path) -> None:
    path = small_folder / "model.safetensors"
    content = path.read_bytes()
    starts = {tensor.offset for tensor in open_checkpoint(small_folder).tensors.values()}
    for length in (
        {0, 1, 7, 8, 9, len(content) - 1} | starts | {start - 1 for start in starts} | {start + 1 for start in starts}
    ):
        assert not isinstance(open_damaged(path, content[:length], opened=small_folder), Checkpoint)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_wrong_json_values_are_refused_or_found(small_folder: Path, name: str) -> None:
    path = small_folder / name
    sound = json.loads(path.read_text())
    places = [(key,) for key in sound] + [
        (key, inner) for key in sound if isinstance(sound[key], dict) for inner in sound[key]
    ]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(place=st.sampled_from(places), value=JSON_VALUES)
    def run(place: tuple[str, ...], value: Any) -> None:
        content = json.loads(json.dumps(sound))
        target = content if len(place) == 1 else content[place[0]]
        target[place[-1]] = value
        path.write_text(json.dumps(content))
        try:
            checkpoint = open_checkpoint(small_folder)
        except CheckpointError as error:
            assert error.file in (str(path), str(small_folder / "config.json"))  # noqa: PT017
            assert error.fix  # noqa: PT017
            return
        tokenizer = checkpoint.vocabulary
        assert tokenizer is not None
        assert all(isinstance(token, str) for token in tokenizer.tokens)

    run()
