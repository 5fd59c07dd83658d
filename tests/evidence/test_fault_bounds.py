"""`evidence/fault-bounds-*`: the README is made of the JSON, and the JSON is of many faults and consistent."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "evidence").glob("fault-bounds-*"))


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    folder = str(ROOT / "benchmarks" / "faults")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("bounds")
    finally:
        sys.path.remove(folder)


def document_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="ascii"))


def test_there_is_evidence() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_made_of_the_json(maker: ModuleType, folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == maker.readme(document_of(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bounds_are_counted_as_they_are_defined(maker: ModuleType, folder: Path) -> None:
    rows = document_of(folder)["cases"]
    faults = [row for row in rows if row["group"] != "clean"]
    clean = [row for row in rows if row["group"] == "clean"]
    assert len(faults) > 25
    assert clean
    if "selection" in document_of(folder):
        # Every part of the model, and faults of both kinds.
        assert {row["layer"] for row in faults} == {None, 0, 14, 27}
        kinds = {group: {row["fault"] for row in faults if row["group"] == group} for group in ("file", "computation")}
        assert {group: len(names) for group, names in kinds.items()} == {
            group: have for group, (have, _) in document_of(folder)["kinds"].items()
        }
        assert len(kinds["file"]) > 25
    for row in rows:
        assert row["positions"] > 0
        assert 0 <= row["flips"] <= row["positions"]
        if row["least_ratio"] is not None:
            assert 0 <= row["least_ratio"] <= row["greatest_ratio"]
    # A fault of the head leaves every layer as it is, and no bound on layers can see it.
    heads = [row for row in faults if row["where"] == "lm_head.weight"]
    assert heads
    assert all(row["least_ratio"] == row["greatest_ratio"] == 1.0 for row in heads)
    # Bounds taken from two arithmetics on one file let these through, and higher floors see no less.
    tests = maker.checks(rows)
    assert not any(broken(row) for name, broken in tests.items() if "two arithmetics" in name for row in clean)
    seen = [sum(maker.below(row, "logit_cosine", floor) for row in faults) for floor in maker.FLOORS]
    assert seen == sorted(seen)
    band = sum(maker.outside(row, maker.BAND) for row in faults)
    assert band < seen[-1] < sum(bool(row["toolkit"]) for row in faults)
