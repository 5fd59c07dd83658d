"""`evidence/check-*`: what `check --evidence` wrote of a real pair has its report's page, and moves a status."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from aprjax.cli import main

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "evidence").glob("check-*"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_evidence", ROOT / "benchmarks" / "check_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_evidence() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_made_of_the_report(maker: ModuleType, folder: Path) -> None:
    report = maker.found_in(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == maker.readme(report)
    assert {one["contract_id"] for one in report["outcomes"]} == set(maker.CONTRACTS)
    # Two files, of which one is a file that anybody can get.
    assert report["sides"]["model"]["sha256"] != report["sides"]["ref"]["sha256"]


@pytest.mark.parametrize("name", ["apr-vs-gguf-forward-parity-v1", "trace-identity-v1"])
def test_it_discharges_a_copy_of_its_contract(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract, folder = tmp_path / "contracts" / f"{name}.yaml", tmp_path / "evidence" / FOLDERS[-1].name
    contract.parent.mkdir()
    text = (ROOT / "contracts" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "status: ACTIVE_FUNCTIONAL" in text
    contract.write_text(
        text.replace("status: ACTIVE_FUNCTIONAL", "status: PROPOSED  # until it is checked", 1), "utf-8"
    )
    shutil.copytree(FOLDERS[-1], folder)
    assert main(["evidence", str(folder), "--discharge", str(contract)]) == 0
    moved = contract.read_text(encoding="utf-8")
    assert "status: ACTIVE" in moved
    assert "# until it is checked" in moved
    assert "status: DISCHARGED" in moved
    # Again: everything stands where it was moved.
    assert main(["evidence", str(folder), "--discharge", str(contract)]) == 1
    # A digit of a measurement altered: the seal is broken, and nothing moves.
    contract.write_text(text, encoding="utf-8")
    raw = json.loads((folder / "check.json").read_text("ascii"))
    raw["seconds"] += 1
    (folder / "check.json").write_text(json.dumps(raw), "ascii")
    assert main(["evidence", str(folder), "--discharge", str(contract)]) == 1
    assert contract.read_text(encoding="utf-8") == text
    capsys.readouterr()
