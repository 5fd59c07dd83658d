"""The SHIP criteria about files: what two files can show, and what stays unmeasured for a stated reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from contract_sides import K_QUANTS, MadeUpBench, outcome, statuses, with_config
from tiny import CONFIG, tiny_checkpoint

from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.open import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.types import Status


def bench(model: Checkpoint, ref: Checkpoint | None = None) -> MadeUpBench:
    return MadeUpBench(files_by_side={"model": model, "ref": ref or model})


def test_ship_criteria(tmp_path: Path) -> None:
    model = tiny_checkpoint(CONFIG, types=K_QUANTS)
    assert set(statuses(bench(model), "FALSIFY-QW2E-001", "FALSIFY-QW2E-003").values()) == {"pass"}
    assert outcome(bench(with_config(model, num_layers=4)), "FALSIFY-QW2E-001").status is Status.FAIL
    for test_id in ("005", "007", "023"):
        found = outcome(bench(model), f"FALSIFY-QW2E-SHIP-{test_id}")
        assert found.status is Status.UNMEASURED
        assert "7B teacher" in found.reason
    assert outcome(bench(model), "FALSIFY-QW2E-SHIP-001").status is Status.UNMEASURED


def test_licence_of_the_teacher() -> None:
    model = tiny_checkpoint(CONFIG)
    assert outcome(bench(model), "FALSIFY-SHIP-009").status is Status.UNMEASURED
    teacher = with_config(model, hidden_size=3584, num_layers=28)
    assert outcome(bench(teacher), "FALSIFY-SHIP-009").status is Status.FAIL
    stated = {"license": "Apache-2.0", "data_source": "Qwen/Qwen2.5-Coder-7B-Instruct"}
    assert outcome(bench(replace(teacher, metadata=stated)), "FALSIFY-SHIP-009").status is Status.PASS
    assert (
        outcome(bench(replace(teacher, metadata={**stated, "license": "MIT"})), "FALSIFY-SHIP-009").status
        is Status.FAIL
    )


def test_safetensors_load(tmp_path: Path) -> None:
    from contract_sides import write_pair

    apr, gguf = write_pair(tmp_path)
    convert(apr, tmp_path / "folder")
    folder = open_checkpoint(tmp_path / "folder")
    name = "FALSIFY-QW2E-SHIP-001"
    assert outcome(bench(folder), name).status is Status.PASS
    file = folder.files[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    assert outcome(bench(folder), name).status is Status.FAIL
    # Magic and block type of the pair beside it.
    pair = bench(open_checkpoint(apr), open_checkpoint(gguf))
    assert statuses(pair, "FALSIFY-PM-008", "FALSIFY-PM-009") == {"FALSIFY-PM-008": "pass", "FALSIFY-PM-009": "pass"}
    lying = open_checkpoint(gguf)
    lying = replace(lying, metadata={**lying.metadata, "general.file_type": 1})
    assert outcome(bench(lying), "FALSIFY-PM-008").status is Status.FAIL


def test_an_unknown_digest_is_no_published_one(tmp_path: Path) -> None:
    from contract_sides import write_pair

    _, gguf = write_pair(tmp_path)
    found = outcome(bench(open_checkpoint(gguf)), "FALSIFY-SHIP-010")
    assert found.status is Status.UNMEASURED
    assert "the digest is unknown" in found.reason
    assert found.measured["digest_is_published"] is False
