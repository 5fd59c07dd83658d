"""`evidence/fast-preset-bound-*`: the README is made of the JSON, and our sums are within the bound at every node."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "evidence").glob("fast-preset-bound-*"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fast_preset_bound", ROOT / "benchmarks" / "fast_preset_bound.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("fast_preset_bound", module)
    spec.loader.exec_module(module)
    return module


def document_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="ascii"))


def test_there_is_evidence() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_made_of_the_json(maker: ModuleType, folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == maker.readme(document_of(folder))
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_node_is_there_and_ours_is_within_the_bound(maker: ModuleType, folder: Path) -> None:
    document = document_of(folder)
    nodes = document["nodes"]
    layers = {node["layer"] for node in nodes} - {-1}
    assert layers == set(range(28))
    # ggml's SwiGLU is one kernel, so that 16 stages of a layer are there; the final norm and the head are two more.
    assert len(nodes) == 28 * 16 + 2
    assert document["bound"] == maker.BOUND
    for node in nodes:
        assert node["ours"] <= maker.BOUND, maker.place(node)
        assert node["equal"] == (node["apart"] == 0)
        # The three distances are those of three points.
        assert node["apart"] <= (node["ours"] + node["engine"]) * 1.001, maker.place(node)
        if node["apart"] > maker.BOUND:
            assert node["engine"] > node["ours"], maker.place(node)
