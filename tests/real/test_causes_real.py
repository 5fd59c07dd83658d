"""`locate` and `attribute` on a real model: planted places found in few passes, and shares that add up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real_model

PLANT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults" / "plant.py"
# Issue "Find the cause", acceptance 2: 2 log2(28) for the layers, and the stages.
MOST_PASSES = 12


@pytest.fixture(scope="module")
def gguf(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen2.5-coder-0.5b")


def bisect(code: int, *arguments: str) -> dict[str, Any]:
    """Runs a command that must exit with this code; its JSON."""
    run = subprocess.run([sys.executable, "-m", "aprjax", *arguments, "--json", "-"], capture_output=True, check=False)
    assert run.returncode == code, run.stderr.decode()
    return json.loads(run.stdout)


def test_two_faults_are_located_in_few_passes(gguf: Path, tmp_path: Path) -> None:
    clean, faulty = tmp_path / "clean.apr", tmp_path / "faulty.apr"
    subprocess.run([sys.executable, "-m", "aprjax", "convert", str(gguf), str(clean), "--keep-blocks"], check=True)
    for layer, fault, place in ((20, "o-proj-transposed", clean), (5, "norm-scaled", faulty)):
        subprocess.run([sys.executable, str(PLANT), place, faulty, "--fault", fault, "--layer", str(layer)], check=True)
    sides = ("--model", str(faulty), "--ref", str(gguf), "--prompt", "What is 2+2?")
    found = bisect(1, "locate", *sides)
    assert [(fault["layer"], fault["stage"]) for fault in found["faults"]] == [(5, "attn_norm"), (20, "attn_out")]
    assert "transposed" in found["faults"][1]["cause"]
    for fault in found["faults"]:
        assert fault["confidence"]["level"] in ("certain", "strong")
        assert fault["next_step"]
    assert max(spent["passes"] for spent in found["passes"].values()) <= MOST_PASSES


def test_the_drift_of_quantized_activations_adds_up(gguf: Path) -> None:
    sides = ("--model", str(gguf), "--ref", str(gguf), "--model-arithmetic", "llama.cpp", "--ref-arithmetic", "float32")
    found = bisect(0, "attribute", *sides, "--prompt", "What is 2+2?", "--steps", "6", "--verify", "1")
    assert found["gap"] <= 0.01
    cause = found["causes"][0]
    assert cause["kind"] == "arithmetic"
    assert cause["name"].startswith("activations quantized per ")
    change = found["metric"]["change"]
    # The other choices only round: the model without this one is the reference.
    assert cause["heals"] == pytest.approx(change, rel=0.01)
    # The reverse has llama.cpp's steps but not its roundings, which move some activations across a step.
    assert cause["infects"] is not None
