"""The fast preset lies within its bound of the exact sums at every node of the layers where the engine is farthest."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.checkpoint import open_checkpoint
from aprjax.text import Tokenizer, wrap
from aprjax.text.probes import PROBES
from aprjax.trace.llama_cpp import run_llama_cpp

pytestmark = [pytest.mark.real_model, pytest.mark.llama_cpp, pytest.mark.usefixtures("llama_library")]

ROOT = Path(__file__).resolve().parents[2]
# Where llama.cpp's attn_out, its ffn_out and our attn_scores are farthest from exact (evidence/fast-preset-bound-*).
LAYERS = (17, 22, 26)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fast_preset_bound", ROOT / "benchmarks" / "fast_preset_bound.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("fast_preset_bound", module)
    spec.loader.exec_module(module)
    return module


def test_every_node_is_within_the_bound_of_the_exact_sums(
    benchmark: ModuleType, model_path: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(model_path("qwen2.5-coder-1.5b"))
    ids = Tokenizer.from_checkpoint(checkpoint).encode(wrap(PROBES[0].text, "once"))[: benchmark.TOKENS]
    nodes = list(benchmark.nodes(run_llama_cpp(checkpoint.path, ids), checkpoint, LAYERS))
    assert len(nodes) == 16 * len(LAYERS)
    for node in nodes:
        assert node["ours"] <= benchmark.BOUND, benchmark.place(node)
        # Where the engine is nearer than the bound, too, so are the two to each other.
        if node["engine"] <= 2e-7:
            assert node["apart"] <= benchmark.BOUND, benchmark.place(node)
    products = {str(stage) for stage in MATMUL_STAGES}
    # What keeps the two apart is the engine's rounding: it is there, and no product of ours has as much.
    assert max(node["engine"] for node in nodes if node["stage"] in products) > benchmark.BOUND
    assert max(node["ours"] for node in nodes if node["stage"] in products) < 2e-7
