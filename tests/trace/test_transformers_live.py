"""transformers run live: what hooks reach is what aprjax computes, in the same layout; the rest is unmeasured."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from qwen2.reference import forward, relative_l2

import aprjax
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace import MemoryTrace
from aprjax.trace.engine import EngineError
from aprjax.trace.hf import run_transformers

TOKENS = [5, 17, 111, 5, 90]
ABSENT = {Stage.QKV_MATMUL, Stage.ATTN_SCORES}


@pytest.fixture(scope="module")
def folder(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which every parameter has something to be wrong about."""
    import torch

    torch.manual_seed(4)
    config = transformers.Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def live(folder: Path) -> MemoryTrace:
    return run_transformers(folder, TOKENS)


@pytest.mark.transformers_peer
def test_every_stage_that_hooks_reach(live: MemoryTrace, folder: Path) -> None:
    expected = forward(aprjax.open(folder), TOKENS)  # in double precision
    inside = {(layer, stage) for layer in range(2) for stage in LAYER_STAGES if stage not in ABSENT}
    outside = {(OUTSIDE, stage) for stage in (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)}
    assert set(live) == inside | outside
    for key in live:
        assert live[key].dtype == np.float32
        assert live[key].shape == expected[key].shape
        # float32 through two layers of 64 channels: measured up to 3.6e-7.
        assert relative_l2(live[key], expected[key]) < 1e-6, key


@pytest.mark.transformers_peer
@pytest.mark.parametrize(("dtype", "mask", "step"), [("float16", 0x1FFF, 2**-11), ("bfloat16", 0xFFFF, 2**-8)])
def test_sixteen_bits_are_sixteen_bits(live: MemoryTrace, folder: Path, dtype: str, mask: int, step: float) -> None:
    half = run_transformers(folder, TOKENS, dtype)
    assert (half.info.engine["dtype"], half.info.arithmetic) == (dtype, f"transformers {dtype}")
    assert set(half) == set(live)
    for key in half:
        # What was computed in 16 bits has no digits beyond them (float16's smallest numbers have fewer bits still).
        normal = np.abs(half[key]) >= np.finfo(np.float16).tiny
        assert not (half[key][normal].view(np.uint32) & mask).any(), key
        # Two layers, some ten roundings each.
        assert relative_l2(half[key], live[key]) < 20 * step, key
    assert any((half[key] != live[key]).any() for key in half)


@pytest.mark.transformers_peer
def test_what_was_run_is_recorded(live: MemoryTrace, folder: Path, transformers: ModuleType) -> None:
    assert live.info.sha256 == aprjax.open(folder).sha256()
    assert live.info.tokens == tuple(TOKENS)
    assert live.info.engine["transformers"] == transformers.__version__
    assert live.info.engine["dtype"] == "float32"


@pytest.mark.transformers_peer
def test_nothing_of_transformers_stays_changed(folder: Path, transformers: ModuleType) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    before = modeling_qwen2.eager_attention_forward
    run_transformers(folder, TOKENS[:2])
    assert modeling_qwen2.eager_attention_forward is before
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.transformers_peer
def test_a_model_that_transformers_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("no such thing\nand a long explanation")

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "from_pretrained", refuse)
    with pytest.raises(EngineError, match=r"cannot load it: no such thing\. Likely") as caught:
        run_transformers(folder, TOKENS)
    assert caught.value.file == str(folder)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run_transformers(tmp_path, TOKENS)
