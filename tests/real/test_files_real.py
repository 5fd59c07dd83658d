"""`bisect files` on a real model with faults planted by `benchmarks/faults/plant.py`, which shares no code with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aprjax.bisect.files.command import compare_two_files
from aprjax.checkpoint.convert import convert

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
LAYERS = "model.layers."


@pytest.fixture(scope="module")
def gguf(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen2.5-coder-0.5b")


@pytest.fixture(scope="module")
def apr(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the other container, which has no Q5_0 and Q8_0: those become F32."""
    path = tmp_path_factory.mktemp("files") / "kept.apr"
    convert(gguf, path, keep_blocks=True)
    return path


def test_the_other_container_holds_equal_values_in_other_block_types(gguf: Path, apr: Path) -> None:
    report = compare_two_files(str(apr), str(gguf), decode=True)
    assert report.verdict == "agree"
    assert report.files.decoded == report.files.compared == 291
    assert len(report.files.tensors) == 291 - report.files.identical_bytes > 100
    assert {t.block_types for t in report.files.tensors} == {("F32", "Q5_0"), ("F32", "Q8_0")}


# Fault, and what `files` must say of it: the first tensor, the explanation and some of its parameters.
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "k-bias-zero": (f"{LAYERS}17.self_attn.k_proj.bias", "zeroed", {}),
    "gate-up-swapped": (f"{LAYERS}9.mlp.gate_proj.weight", "another-tensor", {"exchanged": True}),
    "scale-bits-dropped": ("", "scale-bits-dropped", {"type": "Q4_K"}),
    "head-rows-shifted": ("lm_head.weight", "rows-shifted", {"by": 1, "cyclic": True}),
    "token-row-overwritten": ("model.embed_tokens.weight", "rows-copied", {"first_moves": [[151644, 0]]}),
    "nan-weight": (f"{LAYERS}11.post_attention_layernorm.weight", "not-finite", {"side": "model", "element": 448}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_explained_exactly(gguf: Path, apr: Path, tmp_path: Path, fault: str) -> None:
    name, explanation, parameters = FAULTS[fault]
    model = tmp_path / "planted.apr"
    command = [sys.executable, str(ROOT / "benchmarks" / "faults" / "plant.py"), str(apr), str(model), "--fault", fault]
    planted = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)
    try:
        report = compare_two_files(str(model), str(gguf))
    finally:
        model.unlink()
    assert report.verdict == "divergence"
    assert sorted(t.name for t in report.files.differing) == sorted(planted["tensors"])
    assert {cause.id for cause in report.causes} == {explanation}
    difference = report.files.tensor(name or planted["tensors"][0])
    assert difference is not None
    assert difference.parameters.items() >= parameters.items()
    assert explanation == "not-finite" or difference.exact
