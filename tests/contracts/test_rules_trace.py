"""Traces as files, and that capturing changes nothing: on a tiny model that runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from contract_sides import MadeUpBench, outcome, statuses
from tiny import CONFIG, tiny_checkpoint, write_tiny

from aprjax.contracts.types import Status
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.model import Qwen2

IDS = tuple(f"FALSIFY-APR-TRACE-SAVE-0{number}" for number in ("02", "04", "05", "06", "10"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2:
    file = write_tiny(tmp_path_factory.mktemp("traced") / "model.apr", tiny_checkpoint(CONFIG))
    return Qwen2(file, preset("float32"))


def bench(model: Qwen2, folder: Path) -> MadeUpBench:
    return MadeUpBench(
        files_by_side={"model": model.checkpoint, "ref": model.checkpoint},
        loaded=lambda side: model,
        keep_folder=lambda: folder,
        prompt=lambda name: SimpleNamespace(ids=(1, 2, 3, 4, 5)),
    )


@pytest.mark.thorough
def test_aprt_folders(model: Qwen2, tmp_path: Path) -> None:
    made = bench(model, tmp_path)
    assert set(statuses(made, *IDS).values()) == {"pass"}
    gate = tmp_path / "1" / "layer-1" / "ffn_gate.bin"
    raw = bytearray(gate.read_bytes())
    raw[4] ^= 1
    raw[20] ^= 1
    gate.write_bytes(raw)
    found = statuses(made, *IDS)
    assert found[IDS[0]] == found[IDS[1]] == found[IDS[4]] == "fail"
    gate.unlink()
    assert outcome(made, IDS[2]).status is Status.FAIL


@pytest.mark.thorough
def test_capturing_changes_nothing(model: Qwen2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ("FALSIFY-FFN-GGUF-002", "FALSIFY-ATTN-SUB-005")
    assert set(statuses(bench(model, tmp_path), *ids).values()) == {"pass"}
    right = model.run_with_cache

    def meddling(tokens: list[int]) -> tuple[object, object]:
        logits, captured = right(tokens)
        return np.asarray(logits) + np.float32(0.01), captured

    monkeypatch.setattr(model, "run_with_cache", meddling)
    assert set(statuses(bench(model, tmp_path), *ids).values()) == {"fail"}
