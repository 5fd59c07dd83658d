"""`evidence/margins-*`: the README says what the JSON beside it says, and the JSON is of one model and consistent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "evidence").glob("margins-*"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("margins_evidence", ROOT / "benchmarks" / "margins_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_evidence() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_made_of_the_json(maker: ModuleType, folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == maker.readme(maker.found_in(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_equal_arithmetic_agrees_on_the_tokens_of_the_other_run(maker: ModuleType, folder: Path) -> None:
    runs = maker.found_in(folder)
    assert len({run["sides"]["ref"]["sha256"] for run in runs.values()}) == 1
    cause = runs[maker.CAUSE]
    assert sum(c["integrated"] for c in cause["contributions"]) == pytest.approx(cause["metric"]["change"], rel=0.01)
    assert cause["prompt"]["positions"] == [0]
    for prompt in maker.PROMPTS:
        equal, mixed = runs[f"{prompt}-equal-arithmetic"], runs[f"{prompt}-two-arithmetics"]
        assert equal["fed"]["continuation"] == mixed["fed"]["continuation"]
        assert len(mixed["fed"]["continuation"]) == maker.NEW_TOKENS
        assert (equal["verdict"], equal["exit_code"]) == ("agree", 0)
        assert not any(row["flip"] for row in equal["tokens"])
        # A verdict for every flip, by the rule: near-tie within the reach of the noise, else divergence.
        for row in mixed["tokens"]:
            near = row["rank"] <= 2 and max(row["gap"], row["model_gap"]) <= mixed["noise"]["near_tie_gap"]
            assert row["verdict"] == ("agree" if not row["flip"] else "near-tie" if near else "divergence")


def test_what_was_computed_again_is_near(maker: ModuleType) -> None:
    runs = maker.found_in(FOLDERS[-1])
    again, then = runs[maker.RECHECK], runs["direct-equal-arithmetic"]
    assert again["positions"] == len(then["tokens"])
    # Other sums of one arithmetic: by no more than what counts as noise there.
    assert again["largest_margin_change"] < runs["direct-two-arithmetics"]["noise"]["near_tie_gap"]
    assert again["perplexity_then"] == pytest.approx(then["summary"]["ref_perplexity"], rel=1e-9)
