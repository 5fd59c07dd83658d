"""Output parity: the numbers of two backends, and every position of a pair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from contract_sides import outcome, outcome_of, statuses, write_pair

from aprjax.bisect.report import Verdict
from aprjax.contracts.check import rules_output
from aprjax.contracts.check.measurement import Measurement
from aprjax.contracts.check.rules_output import device_numbers
from aprjax.contracts.types import Status

IDS = tuple(f"FALSIFY-CPU-GPU-0{number}" for number in ("01", "02", "06", "07", "13", "14"))


def judged(ours: np.ndarray, theirs: np.ndarray, platform: str = "gpu") -> dict[str, str]:
    found = Measurement(device_numbers(ours, theirs, platform))
    return {test_id: str(outcome_of(test_id, found).status) for test_id in (*IDS, "PARITY-001", "PARITY-003")}


def test_numbers_of_two_backends() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.normal(size=(64, 500)).astype(np.float32)
    noisy = theirs + generator.normal(size=theirs.shape).astype(np.float32) * np.float32(1e-5)
    assert set(judged(noisy, theirs).values()) == {"pass"}
    # A transposed head: another function, cosine near 0 (upstream's -0.005190).
    found = judged(generator.permutation(theirs.T).T.astype(np.float32), theirs)
    assert {found[name] for name in ("FALSIFY-CPU-GPU-002", "FALSIFY-CPU-GPU-013", "PARITY-001")} == {"fail"}
    # The processor compared with itself is no GPU; 63 positions are not 64.
    assert judged(theirs, theirs, "cpu")["FALSIFY-CPU-GPU-014"] == "fail"
    assert judged(theirs[:63], theirs[:63])["FALSIFY-CPU-GPU-013"] == "fail"
    zeros = judged(np.zeros_like(theirs), theirs)
    assert zeros["FALSIFY-CPU-GPU-013"] == "fail"


def test_a_flip_across_a_wide_gap_is_none_of_a_near_tie() -> None:
    theirs = np.zeros((64, 10), np.float32)
    theirs[:, 0], theirs[:, 1] = 10.0, 9.0
    near = theirs.copy()
    near[3, 1] = 10.1
    assert device_numbers(near, theirs, "gpu")["widest_relative_gap_of_a_flip"] == pytest.approx(0.1)
    assert judged(near, theirs)["FALSIFY-CPU-GPU-007"] == "pass"
    theirs[3, 1] = 8.0
    assert judged(near, theirs)["FALSIFY-CPU-GPU-007"] == "fail"


def test_without_a_gpu_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_output, "gpu", lambda: None)
    for test_id in (*IDS, "PARITY-001"):
        found = outcome(SimpleNamespace(), test_id)
        assert found.status is Status.UNMEASURED
        assert "no GPU" in found.reason


@pytest.mark.thorough
def test_every_position_of_a_pair(tmp_path: Path) -> None:
    from aprjax.contracts.check.bench import Bench

    apr, gguf = write_pair(tmp_path)
    bench = Bench(str(apr), str(gguf))
    found = statuses(bench, "APRJAX-OUTPUT-001", "APRJAX-OUTPUT-003")
    assert found["APRJAX-OUTPUT-001"] == "pass"
    measured = outcome(bench, "APRJAX-OUTPUT-003").measured
    assert measured["positions"] == 96
    # Rounding activations shows, and is far from another function.
    assert 0.9 < measured["least_cosine"] < 1.0


def test_a_short_trace_is_no_failure() -> None:
    row = SimpleNamespace(cosine=1.0, verdict=Verdict.AGREE, kl=0.0, max_delta=0.0, model=1, position=0, flip=False)
    side = SimpleNamespace(arithmetic="llama.cpp")

    def bench(count: int, **changes: object) -> SimpleNamespace:
        rows = [SimpleNamespace(**{**vars(row), **changes})] * count
        report = SimpleNamespace(
            verdict=Verdict.AGREE, reason="", rows=rows, flips=[], sides={"model": side, "ref": side}
        )
        return SimpleNamespace(output=lambda what: report)

    assert outcome(bench(64), "APRJAX-OUTPUT-001").status is Status.PASS
    short = outcome(bench(12), "APRJAX-OUTPUT-001")
    assert short.status is Status.UNMEASURED
    assert "12 positions, 64 are needed" in short.reason
    # What is broken on twelve positions is broken.
    assert outcome(bench(12, cosine=0.5), "APRJAX-OUTPUT-001").status is Status.FAIL


@pytest.mark.thorough
@pytest.mark.llama_cpp
def test_two_backends_on_one_file(llama_library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import with_tensor, write_tiny

    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.convert import convert
    from aprjax.contracts.check.bench import Bench

    apr, gguf = write_pair(tmp_path)
    found = outcome(Bench(str(apr), str(gguf)), "APRJAX-OUTPUT-002")
    assert found.status is Status.PASS
    assert found.measured["positions"] == 96
    # llama.cpp runs another model than XLA: a layer's down projection is not the same.
    name = "model.layers.1.mlp.down_proj.weight"
    model = open_checkpoint(apr)
    other = write_tiny(tmp_path / "other.apr", with_tensor(model, name, model.tensors[name].decode()[::-1]))
    convert(other.path, tmp_path / "other.gguf", keep_blocks=True)
    bench = Bench(str(apr), str(gguf))
    right = bench._llama_cpp
    monkeypatch.setattr(bench, "_llama_cpp", lambda file, *more: right(open_checkpoint(tmp_path / "other.gguf"), *more))
    assert outcome(bench, "APRJAX-OUTPUT-002").status is Status.FAIL
