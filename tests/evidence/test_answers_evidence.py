"""The open questions of the upstream effort: each README is made of the JSON beside it, and the JSON is consistent."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    """A script under benchmarks/, whose page is to be made again."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="ascii"))


def one_document(module: ModuleType, folder: Path) -> str:
    return module.readme(result(folder))


def two_documents(module: ModuleType, folder: Path) -> str:
    return module.readme(module.found_in(folder), folder.name)


MADE: list[tuple[str, str, Callable[[ModuleType, Path], str]]] = [
    ("selection-or-kernel", "selection_or_kernel", one_document),
    ("pred-61", "pred_61", one_document),
    ("degenerate-text", "degenerate_text", two_documents),
]


def folders(name: str) -> list[Path]:
    return sorted((ROOT / "evidence").glob(f"{name}-2*"))


@pytest.mark.parametrize(("name", "script", "page"), MADE, ids=[name for name, _, _ in MADE])
def test_the_readme_is_made_of_the_json(name: str, script: str, page: Callable[[ModuleType, Path], str]) -> None:
    module = load(script)
    assert folders(name)
    for folder in folders(name):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text == page(module, folder)
        assert f"benchmarks/{script}.py --out evidence/{folder.name}" in text
        assert "## What carries over to the 7B, and what does not" in text
        assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")


def test_the_factors_of_the_ratio_multiply_to_the_whole() -> None:
    module = load("selection_or_kernel")
    document = result(folders("selection-or-kernel")[-1])
    assert document["ratios"] == module.ratios(document)
    for stage, found in document["ratios"].items():
        assert len(found["both"]) == document["model"]["layers"]
        for both, selection, arithmetic in zip(
            found["both"], found["selection alone"], found["arithmetic alone, all tokens"], strict=True
        ):
            assert both == pytest.approx(selection * arithmetic, rel=1e-12), stage
    shares = module.summary(document)
    assert shares["selection_share"] + shares["arithmetic_share"] == pytest.approx(1)
    # The verdict of the page: the choice of tokens makes the ratio, the kernel next to nothing of it.
    assert shares["selection_share"] > 0.9
    assert abs(math.log(shares["last"])) < math.log(module.BAND[1])


def test_both_formats_were_asked_every_prompt_of_both_predictions() -> None:
    module = load("pred_61")
    document = result(folders("pred-61")[-1])
    asked = {(name, wrap) for p in module.PREDICTIONS.values() for name in p["prompts"] for wrap in p["wraps"]}
    for kind in ("gguf", "apr"):
        for arithmetic in module.ARITHMETICS:
            rows = [r for r in document["rows"] if (r["format"], r["arithmetic"]) == (kind, arithmetic)]
            assert {(row["prompt"], row["wrap"]) for row in rows} == asked
            assert all(len(row["tokens"]) <= document["budget"] for row in rows)
    assert len(set(document["files"].values())) == 2
    assert module.unequal(document) == 0


def test_every_planted_fault_is_of_a_factor_and_judged_as_the_gate_judges() -> None:
    from aprjax.text.degenerate import judge_text

    module = load("degenerate_text")
    documents = module.found_in(folders("degenerate-text")[-1])
    rows = documents["planted"]["rows"]
    assert {row["factor"] for row in rows} == {"none", "stop tokens", "double wrapping", "special tokens", "drift"}
    for row in rows:
        refused = not judge_text(row["text"], prompt=row["fed"]).passed
        assert refused == (row["gate"]["rule"] not in (None, "expected")), row["fault"]
        if row["factor"] == "none":
            assert row["logits_cosine"] == pytest.approx(1)
            assert row["state"] == "clean"
    # Texts as long as upstream's gate allows.
    if "long" in documents:
        long = sys.modules["degenerate_long"]
        for row in documents["long"]["texts"]:
            assert len(row["tokens"]) == long.TOKENS == module.GATE_BUDGET
            verdict = judge_text(row["text"])
            assert (verdict.passed, verdict.rule) == (row["gate"]["passed"], row["gate"]["rule"])
            assert set(row["states"]) == set(row["left_out"]) == {str(count) for count in long.JUDGED}
        for row in documents["long"]["drift"]:
            assert len(row["cosine"]) == len(row["margin"]) == long.TOKENS
    # The factorial of the sound pair is a measurement of its own.
    if "factorial" in documents:
        claims = {claim["id"] for claim in documents["factorial"]["claims"]}
        assert claims >= {"chatml-path", "special-tokens", "drift", "stop-tokens", "double-wrapping"}
