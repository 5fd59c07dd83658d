"""llama.cpp run live: every stage is where we say it is, and what fails ends in words, not in stray output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from local import local_differences
from tiny import CONFIG, random_values, tiny_checkpoint, write_tiny
from trace_samples import same_bits

import aprjax
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage
from aprjax.trace import MemoryTrace
from aprjax.trace.engine import EngineError
from aprjax.trace.llama_cpp import LlamaOptions, engine_facts, run_llama_cpp

# Eight, so that no padding rows are needed when our model runs from the engine's values.
TOKENS = [5, 17, 40, 5, 90, 3, 7, 8]
OUTSIDE_STAGES = (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)
# The bound for the fast path, whose sums are re-associated. Measured on this model: up to 2.4e-7.
LOCAL = 3e-7


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    write_tiny(folder / "tiny.apr", tiny_checkpoint(types={"": "Q4_K", "down": "Q6_K"}))
    convert(folder / "tiny.apr", folder / "tiny.gguf", keep_blocks=True)
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def live(llama_cpp: ModuleType, gguf: Path) -> MemoryTrace:
    """One run, with some of the engine's own nodes."""
    return run_llama_cpp(gguf, TOKENS, raw=("kq", "norm"))


def expected_keys(layers: int, *absent: Stage) -> set[tuple[int, Stage]]:
    inside = {(layer, stage) for layer in range(layers) for stage in LAYER_STAGES if stage not in absent}
    return inside | {(OUTSIDE, stage) for stage in OUTSIDE_STAGES}


@pytest.mark.llama_cpp
def test_every_stage_but_silu_is_there_in_our_layout(live: MemoryTrace, gguf: Path) -> None:
    checkpoint = aprjax.open(gguf)
    config = checkpoint.config
    assert set(live) == expected_keys(config.num_layers, Stage.FFN_SILU)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].decode()[TOKENS]
    assert same_bits(live[OUTSIDE, Stage.EMBEDDING], embedding)
    differences = local_differences(checkpoint, live, PRESETS["llama.cpp"], list(range(config.num_layers)))
    assert set(differences) == set(live) - {(OUTSIDE, Stage.EMBEDDING)}
    assert max(differences.values()) <= LOCAL, max(differences.items(), key=lambda item: item[1])


@pytest.mark.llama_cpp
def test_what_was_run_is_recorded(live: MemoryTrace, gguf: Path) -> None:
    info = live.info
    assert (info.path, info.sha256, info.tokens) == (str(gguf), aprjax.open(gguf).sha256(), tuple(TOKENS))
    assert info.positions == info.head_positions == tuple(range(8))
    assert info.engine["ggml_version"] == "0.25.3"
    assert info.engine["GGML_CPU_TILED_MM"] == "0"
    assert (info.engine["type_k"], info.engine["flash_attention"]) == ("f32", "False")
    assert "AVX" in info.engine["system_info"] or "NEON" in info.engine["system_info"]
    assert len(info.engine["ggml_cpu_sha256"]) == 64
    # What is known of the engine before it runs.
    assert engine_facts(LlamaOptions()).items() <= info.engine.items()


@pytest.mark.llama_cpp
def test_the_engines_own_nodes(live: MemoryTrace, gguf: Path) -> None:
    config = aprjax.open(gguf).config
    assert len(live.extra) == 3 * config.num_layers + 1  # a product and two norms in each, and the final norm
    raw = live.extra["kq-1:MUL_MAT"]
    assert raw.shape == (1, config.num_heads, 8, 256)  # keys padded to the cache's granularity
    scaled = raw[0, :, :, :8].transpose(1, 0, 2).reshape(8, -1) * np.float32(config.head_dim**-0.5)
    assert same_bits(live[1, Stage.ATTN_SCORES], scaled)
    weight = aprjax.open(gguf).tensors["model.layers.1.post_attention_layernorm.weight"].decode()
    normed = live.extra["norm-1:RMS_NORM#2"].reshape(8, -1) * weight
    assert same_bits(live[1, Stage.FFN_NORM], normed)


@pytest.mark.llama_cpp
def test_the_probabilities_are_causal_and_sum_to_one(live: MemoryTrace) -> None:
    rows = live[0, Stage.ATTN_SOFTMAX].reshape(8, -1, 8)
    assert not np.triu(rows.transpose(1, 0, 2), 1).any()
    assert np.abs(rows.sum(axis=2) - 1).max() < 1e-6  # eight float32 terms, each within half an ulp


@pytest.mark.llama_cpp
def test_the_logits_are_those_of_the_public_interface(llama_cpp: ModuleType, live: MemoryTrace, gguf: Path) -> None:
    model = llama_cpp.Llama(
        str(gguf), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    try:
        model.eval(TOKENS)
        assert same_bits(live[OUTSIDE, Stage.LM_HEAD], np.array(model.scores[: len(TOKENS)], np.float32))
    finally:
        model.close()


@pytest.mark.llama_cpp
def test_the_plain_build_depends_on_neither_batch_nor_threads(
    live: MemoryTrace, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prefix = run_llama_cpp(gguf, TOKENS[:5], LlamaOptions(threads=1))
    for layer, stage in prefix:
        if stage not in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX):  # one column per key
            assert same_bits(prefix[layer, stage], live[layer, stage][:5]), (layer, stage)
    assert prefix.extra == {}
    assert list(tmp_path.iterdir()) == []
    stepwise = run_llama_cpp(gguf, TOKENS, LlamaOptions(step=3), raw=("kqv",))
    assert set(stepwise) == expected_keys(3, Stage.FFN_SILU, Stage.ATTN_SCORES)
    for key in stepwise:
        assert same_bits(stepwise[key], live[key]), key
    assert stepwise.info.engine["step"] == "3"
    assert set(stepwise.extra) == {f"kqv-{layer}:MUL_MAT{n}" for layer in range(3) for n in ("", "#2", "#3")}


@pytest.mark.llama_cpp
def test_flash_attention_and_a_float16_cache(live: MemoryTrace, gguf: Path) -> None:
    fused = run_llama_cpp(gguf, TOKENS, LlamaOptions("f16", "f16", flash_attention=True))
    absent = (Stage.FFN_SILU, Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)
    assert set(fused) == expected_keys(3, *absent)
    assert same_bits(fused[0, Stage.QKV_BIAS], live[0, Stage.QKV_BIAS])
    ours, theirs = fused[0, Stage.ATTENTION], live[0, Stage.ATTENTION]
    # Rounding to float16 (2^-11) of keys, values and probabilities shows, and is no more than that.
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 2**-9


@pytest.mark.llama_cpp
def test_nan_is_kept_where_it_arises(llama_cpp: ModuleType, tmp_path: Path) -> None:
    values = random_values(CONFIG)
    values["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_tiny(tmp_path / "nan.apr", tiny_checkpoint(values=values))
    convert(tmp_path / "nan.apr", tmp_path / "nan.gguf", keep_blocks=True)
    trace = run_llama_cpp(tmp_path / "nan.gguf", TOKENS[:3])
    first = next(key for key in trace if key[0] != OUTSIDE and np.isnan(trace[key]).any())
    assert first == (1, Stage.FFN_UP)
    assert np.argwhere(np.isnan(trace[first])).tolist() == [[0, 3], [1, 3], [2, 3]]


@pytest.mark.llama_cpp
def test_json_on_stdout_is_json_and_stderr_is_quiet(llama_cpp: ModuleType, gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "trace.safetensors"
    command = ["trace", f"llama.cpp:{gguf}", "--tokens", "5,17", "--save", str(target), "--json", "-"]
    root = Path(aprjax.__file__).resolve().parents[1]
    finished = subprocess.run(
        [sys.executable, "-m", "aprjax", *command],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, b"")
    summary = json.loads(finished.stdout)
    assert summary["absent"] == ["ffn_silu"]
    assert len(MemoryTrace.load(target)) == len(summary["values"]) == 3 + 16 * 3


@pytest.mark.llama_cpp
def test_a_library_that_is_not_there(llama_cpp: ModuleType, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"llama\.cpp failed: .*llama.* not found"):
        run_llama_cpp(gguf, TOKENS, LlamaOptions(library=str(tmp_path)))
    with pytest.raises(EngineError, match=r"llama\.cpp failed: .*llama.* not found"):
        engine_facts(LlamaOptions(library=str(tmp_path)))


def test_a_crash_of_the_engine_is_an_error_of_one_sentence(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="without llama-cpp-python nothing is started")
    shell = tmp_path / "crash"
    shell.write_text("#!/bin/sh\necho GGML_ASSERT failed >&2\nkill -ABRT $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    with pytest.raises(EngineError, match=r"ended by signal 6: GGML_ASSERT failed") as caught:
        run_llama_cpp(gguf, TOKENS)
    assert caught.value.file == str(gguf)


@pytest.mark.llama_cpp
def test_another_version_is_refused(
    llama_cpp: ModuleType, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("__version__ = '0.3.35'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"expected llama-cpp-python 0\.3\.36, found 0\.3\.35.*make peers"):
        run_llama_cpp(gguf, TOKENS)


def test_without_llama_cpp_the_message_says_how_to_get_it(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"not installed.*make peers"):
        run_llama_cpp(gguf, TOKENS)


def test_files_that_llama_cpp_is_not_asked_to_run(gguf: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a GGUF file of the architecture qwen2, found apr"):
        run_llama_cpp(gguf.with_suffix(".apr"), TOKENS)


@pytest.mark.real_model
@pytest.mark.llama_cpp
def test_the_real_half_billion_model(llama_cpp: ModuleType, model_path: Callable[[str], Path]) -> None:
    path = model_path("qwen2.5-coder-0.5b")
    checkpoint = aprjax.open(path)
    tokens = [750, 15801, 1445, 1648, 510, 262, 421, 308]  # def fib(n):, and the lines that follow
    trace = run_llama_cpp(path, tokens)
    assert set(trace) == expected_keys(24, Stage.FFN_SILU)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].decode_rows(np.array(tokens))
    assert same_bits(trace[OUTSIDE, Stage.EMBEDDING], embedding)
    differences = local_differences(checkpoint, trace, PRESETS["llama.cpp"], list(range(24)))
    # ffn_down sums 4864 products: measured 3.3e-7 in one layer, everything else at most 2.7e-7.
    bounds = {Stage.FFN_OUT: 4e-7}
    for (layer, stage), difference in differences.items():
        assert difference <= bounds.get(stage, LOCAL), (layer, stage)
