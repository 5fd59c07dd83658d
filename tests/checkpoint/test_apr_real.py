"""The real 1.5B model as an APR file: sound, quick to open, and faults planted in it show where they should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.values import scan_values

pytestmark = pytest.mark.real_model
PLANT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults" / "plant.py"


@pytest.fixture(scope="module")
def converted(model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("real") / "model.apr"
    convert(model_path("qwen2.5-coder-1.5b"), target)
    return target


def test_it_reads_without_a_finding(converted: Path) -> None:
    checkpoint = read_apr(converted, verify=True)
    assert checkpoint.findings == ()
    assert len(checkpoint.tensors) == 339
    assert scan_values(checkpoint) == ()


def test_it_opens_quickly(converted: Path) -> None:
    read_apr(converted)
    start = time.perf_counter()
    read_apr(converted)
    # 0.10 s on two cores of an EPYC, nearly all for 6 MB of vocabulary; five times that for a busy machine.
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("rope-theta", {"layer": 0, "stage": "q_post_rope"}),
        ("rope-type", {"layer": 0, "stage": "q_post_rope"}),
        ("rms-eps", {"layer": 0, "stage": "attn_norm"}),
        ("k-bias-zero", {"layer": 17, "stage": "qkv_bias"}),
        ("gate-up-swapped", {"layer": 9, "stage": "ffn_gate"}),
        ("o-proj-transposed", {"layer": 5, "stage": "attn_out"}),
        ("nibbles-interleaved", {"layer": 3, "stage": "ffn_gate"}),
        ("scale-bits-dropped", {"layer": -1, "stage": "embedding"}),
        ("head-rows-shifted", {"layer": -1, "stage": "lm_head"}),
        ("token-row-overwritten", {"layer": -1, "stage": "embedding"}),
        ("tensor-missing", {"finding": "missing-tensor"}),
        ("header-crc", {"finding": "apr-header-crc-wrong"}),
    ],
)
def test_every_fault_can_be_planted(converted: Path, fault: str, expected: dict[str, object]) -> None:
    target = converted.with_name("planted.apr")
    run = subprocess.run(
        [sys.executable, PLANT, converted, target, "--fault", fault], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["expected"] == expected
    planted = read_apr(target)
    if "finding" in expected:
        assert expected["finding"] in {finding.id for finding in planted.findings}
    target.unlink()
