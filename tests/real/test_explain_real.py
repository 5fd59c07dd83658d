"""`explain` on the 0.5B: llama.cpp run with another rotary base and epsilon, and a model with another score scale."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aprjax.bisect.explain.command import explain_side
from aprjax.bisect.explain.hypothesis import Parameter
from aprjax.bisect.explain.report import ExplainReport
from aprjax.bisect.explain.run import explain
from aprjax.checkpoint import open_checkpoint
from aprjax.qwen2 import PRESETS, kernels
from aprjax.trace.llama_cpp import save_llama_cpp
from aprjax.trace.sides import run_checkpoint

TOKENS = [151644, 872, 198, 3838, 374, 220, 17, 10, 17, 30, 151645, 198, 151644, 77091, 198]
pytestmark = pytest.mark.real_model


@pytest.fixture
def file(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen2.5-coder-0.5b")


def number(report: ExplainReport, slug: str, name: str) -> Parameter:
    parameter = next(found for found in report.explanations if found.id == slug).parameters[name]
    assert isinstance(parameter, Parameter)
    return parameter


@pytest.mark.llama_cpp
def test_llama_cpp_run_with_another_base_and_epsilon(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_library: Any
) -> None:
    run = subprocess.run

    def otherwise(arguments: list[str], **options: Any) -> Any:
        script = Path(__file__).with_name("llama_otherwise.py")
        return run([sys.executable, str(script), "123456", "2e-5"], **options)

    with monkeypatch.context() as patched:
        patched.setattr("aprjax.trace.llama_cpp.subprocess.run", otherwise)
        save_llama_cpp(file, TOKENS, tmp_path / "trace.safetensors")
    # The trace claims the file's own SHA-256: from its values alone must follow what was wrong.
    report = explain_side(str(tmp_path / "trace.safetensors"), file, arithmetic="llama.cpp")
    assert sorted(found.id for found in report.explanations) == ["rms-eps", "rope-theta"]
    assert report.explained
    assert all(found.everywhere for found in report.explanations)
    theta = next(found for found in report.explanations if found.id == "rope-theta")
    assert theta.layers == tuple(range(24))
    found = number(report, "rope-theta", "rope_theta"), number(report, "rms-eps", "rms_norm_eps")
    for parameter, true, near in zip(found, (123456.0, 2e-5), (1e-5, 1e-3), strict=True):
        assert parameter.value == pytest.approx(true, rel=near)
        # What is stated as its error covers what llama.cpp's float32 makes of it.
        assert parameter.error is not None
        assert abs(parameter.value - true) <= parameter.error <= 10 * near * true


def test_a_scale_in_the_0_5b(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(file)
    sound = kernels.attention_scores
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "attention_scores", lambda q, k, arithmetic: sound(q, k, arithmetic) * (8 * 0.113))
        # Another name, so that no program compiled for the sound kernel is used.
        trace = run_checkpoint(checkpoint, TOKENS, replace(PRESETS["float32"], name="another scale"))
    trace = replace(trace, info=replace(trace.info, arithmetic="float32"))
    report = explain(trace, checkpoint, PRESETS["float32"])
    assert [found.id for found in report.explanations] == ["attn-scale"]
    assert report.explained
    scale = number(report, "attn-scale", "score_scale")
    assert scale.value == pytest.approx(0.113, rel=1e-4)
    assert scale.file == 0.125
