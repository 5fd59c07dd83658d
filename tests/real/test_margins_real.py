"""`margins` and the noise floor on the real models: equal arithmetic, two arithmetics, and llama.cpp live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aprjax.bisect.lockstep import Runner
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.logits import measure_logit_noise
from aprjax.checkpoint import open_checkpoint
from aprjax.cli import main
from aprjax.qwen2 import PRESETS
from aprjax.text import PROBES, Tokenizer

pytestmark = pytest.mark.real_model

# The beginning of the long probe; one number of tokens, so that all runs share compiled programs.
TOKENS = 64


@pytest.fixture(scope="module")
def gguf(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen2.5-coder-0.5b")


@pytest.fixture(scope="module")
def ids(gguf: Path) -> list[int]:
    return Tokenizer.from_checkpoint(open_checkpoint(gguf)).encode(PROBES[2].text)[:TOKENS]


def test_sigma_is_what_moves_gaps_and_integers_make_it(gguf: Path, ids: list[int]) -> None:
    """Sigma of ten tokens, of the vocabulary and of the gap that decides agree; decoded sums have almost none."""
    checkpoint = open_checkpoint(gguf)
    integer = measure_logit_noise(None, Runner(checkpoint, PRESETS["llama.cpp"]), ids, steps=8)
    assert len(integer.changes) == 3
    # kernels.md section 5: legitimate builds are 0.06 to 0.085 apart; half as much to half as much again.
    assert 0.03 < integer.sigma < 0.12
    for change in integer.changes:
        # One position at a time moves least (0.021, the others 0.057 and 0.068) since the products' bits hang no longer
        # on the rows beside them (`blocks/roundings.py`). Whatever moves, quantized activations make it far larger
        # than decoded sums have it: thirty times the bound below.
        assert 0.003 < change.sigma <= integer.sigma
        assert change.sigma_vocabulary == pytest.approx(change.sigma, rel=0.3)
        assert change.sigma_top2 == pytest.approx(change.sigma, rel=0.4)
        # Of some 60 gaps none moves by more than the near-tie's reach, and a half more for the tail's sake.
        assert change.largest_gap_change < 1.5 * NEAR_TIE_SIGMAS * integer.sigma
    decoded = measure_logit_noise(Runner(checkpoint, PRESETS["float32"]), None, ids, steps=0)
    assert 0 < decoded.sigma < 1e-4


@pytest.mark.llama_cpp
def test_llama_cpp_and_its_exact_arithmetic_make_the_same_logits(
    gguf: Path, llama_library: object, tmp_path: Path
) -> None:
    """Not near: equal, so that every margin is the engine's own, `def fib(n):` and its near-tie included."""
    target = tmp_path / "margins.json"
    options = ("--prompt", "def fib(n):", "--no-noise", "--json", str(target))
    assert main(["margins", "--model", f"llama.cpp:{gguf}", "--ref", str(gguf), *options]) == 0
    document = json.loads(target.read_text())
    assert document["sides"]["ref"]["arithmetic"] == "llama.cpp-exact"
    assert {row["max_delta"] for row in document["tokens"]} == {0.0}
    # The prompt that the whole story hangs on ends on a near-tie (198 against 220).
    last = document["tokens"][-1]
    assert {last["ref"]["top1"], last["ref"]["top2"]} == {198, 220}
    assert last["ref"]["margin"] < 0.05


def test_two_arithmetics_on_one_file_flip_at_near_ties_alone(gguf: Path, ids: list[int], tmp_path: Path) -> None:
    target = tmp_path / "margins.json"
    arithmetics = ("--model-arithmetic", "float32", "--ref-arithmetic", "llama.cpp")
    prompt, continuation = (",".join(map(str, part)) for part in (ids[:40], ids[40:]))
    options = ("--tokens", prompt, "--continuation-tokens", continuation, "--json", str(target))
    code = main(["margins", "--model", str(gguf), "--ref", str(gguf), *arithmetics, *options])
    document = json.loads(target.read_text())
    assert code == 0, document["reason"]
    assert document["verdict"] in ("agree", "near-tie")
    assert len(document["tokens"]) == TOKENS
    for row in document["tokens"]:
        if row["flip"]:
            assert row["verdict"] == "near-tie"
            assert row["at_risk"]
            assert row["rank"] == 2
            assert row["gap_sigmas"] <= NEAR_TIE_SIGMAS
    assert {change["side"] for change in document["noise"]["changes"]} == {"ref", "model"}
    by_noise = document["flip_bounds"][0]
    assert by_noise["caught"] == by_noise["flips"]
    assert document["findings"][0]["id"] == "files-compared"
