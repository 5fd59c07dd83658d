"""However many layers a model has, one is in memory: peaks of real processes, on models that differ in depth alone."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aprjax.trace import Trace

ROOT = Path(__file__).resolve().parents[2]
FEW, MANY = 4, 24
TOKENS = ",".join(str(3 * index) for index in range(64))
# Runs a command, and says the program's largest resident size. `ru_maxrss` would begin with that of the tests' process,
# beside which no growth would show.
PEAK = """
import json, sys
from aprjax.cli import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([code, peak * 1024]), file=sys.stderr)
"""

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    """Models of one width and two depths, as GGUF and as APR."""
    folder = tmp_path_factory.mktemp("depths")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        synthetic = importlib.import_module("synthetic")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    made: dict[int, dict[str, Path]] = {}
    for count in (FEW, MANY):
        config = synthetic.config_of("1.5b", layers=count)
        config = replace(config, hidden_size=512, num_heads=4, num_kv_heads=2, intermediate_size=2048, vocab_size=512)
        made[count] = {kind: folder / f"{count}.{kind}" for kind in ("gguf", "apr")}
        for path in made[count].values():
            synthetic.write_synthetic(path, config)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All depths share their programs, so that no peak is the compiler's."""
    return tmp_path_factory.mktemp("cache")


def peak(arguments: list[str], cache: Path) -> int:
    environment = {**os.environ, "APRJAX_CACHE": str(cache)}
    command = [sys.executable, "-c", PEAK, *arguments, "--tokens", TOKENS]
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    assert outcome.returncode == 0, outcome.stderr
    code, size = json.loads(outcome.stderr.splitlines()[-1])
    assert code == 0, outcome.stderr
    return size


@pytest.mark.parametrize("command", ["trace", "layers", "layers in float32"])
def test_the_peak_does_not_grow_with_the_layers(
    models: dict[int, dict[str, Path]], cache: Path, tmp_path: Path, command: str
) -> None:
    def arguments(count: int) -> list[str]:
        if command == "trace":
            return ["trace", str(models[count]["gguf"]), "--save", str(tmp_path / f"{count}.safetensors")]
        sides = ["layers", "--model", str(models[count]["apr"]), "--ref", str(models[count]["gguf"])]
        arithmetic = "float32" if "float32" in command else "llama.cpp"
        return [*sides, "--arithmetic", arithmetic, "--save-trace", str(tmp_path / f"{count}")]

    peak(arguments(MANY), cache)  # compiles
    sizes = {count: peak(arguments(count), cache) for count in (FEW, MANY)}
    saved = {count: list(tmp_path.glob(f"{count}.*safetensors")) for count in (FEW, MANY)}
    values = sum(file.stat().st_size for file in saved[MANY]) - sum(file.stat().st_size for file in saved[FEW])
    weights = models[MANY]["gguf"].stat().st_size - models[FEW]["gguf"].stat().st_size
    assert len(saved[MANY]) == (1 if command == "trace" else 2)
    assert all(len(Trace.load(file)) == 3 + 17 * MANY for file in saved[MANY])
    held = len(saved[MANY]) * weights + values
    growth = sizes[MANY] - sizes[FEW]
    # Weights and values of twenty more layers, held, would take all of `held`. What is let go comes back to the system
    # in parts: a fifth of it is left to the allocator.
    assert growth < held / 5, (sizes, held)
