"""`evidence/generation-parity-*`: the README says what the JSON beside it says, and the JSON is consistent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "evidence").glob("generation-parity-*"))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generation_parity", ROOT / "benchmarks" / "generation_parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_evidence() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_what_the_benchmark_makes_of_the_json(benchmark: ModuleType, folder: Path) -> None:
    references, results = benchmark.found_in(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == benchmark.readme(
        references, results, benchmark.rechecked(folder)
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_result_is_of_what_llama_cpp_generated(benchmark: ModuleType, folder: Path) -> None:
    from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS

    references, results = benchmark.found_in(folder)
    generated = {reference["sha256"]: reference for reference in references}
    assert results
    for reference in references:
        assert len(reference["prompts"]) >= 20  # the number
        for prompt in reference["prompts"]:
            assert len(prompt["tokens"]) == len(prompt["logits"]) == reference["new_tokens"] == 128
    for result in results:
        prompts = {prompt["name"]: prompt for prompt in generated[result["sha256"]]["prompts"]}
        for row in result["prompts"]:
            prompt, first = prompts[row["name"]], row["first_difference"]
            assert row["smallest_margin"] == min(best - second for best, second in prompt["logits"])
            assert (first is None) == (row["equal_tokens"] == 128)
            if first is not None:
                assert first["step"] == row["equal_tokens"]
                assert first["token"] == prompt["tokens"][first["step"]] != first["ours"]
                assert first["near_tie"] == (first["rank"] <= 2 and first["gap"] <= NEAR_TIE_SIGMAS * first["sigma"])
            # Equal logits cannot choose differently.
            assert row["steps_with_equal_top_two_logits"] <= 128 - (first is not None)


def test_what_was_computed_again_is_equal(benchmark: ModuleType) -> None:
    # The exact presets' bits are the engine's, so that no later commit may have others.
    for row in (again := benchmark.rechecked(FOLDERS[-1]))["prompts"]:
        assert (row["equal_tokens"], row["steps_with_equal_top_two_logits"]) == (128, 128)
    assert again["arithmetic"] == "llama.cpp-exact"
    assert len(again["prompts"]) >= 3
