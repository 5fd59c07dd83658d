"""llama.cpp and its exact emulation generate the same tokens on the 0.5B: a few prompts of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aprjax.bisect.generate.compare import generate
from aprjax.bisect.generate.sides import LlamaGenerator, LocalGenerator
from aprjax.bisect.noise.logits import LogitNoise
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.checkpoint import open_checkpoint
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.text import Tokenizer, wrap
from aprjax.trace.llama_cpp import LlamaOptions

pytestmark = [pytest.mark.real_model, pytest.mark.llama_cpp, pytest.mark.usefixtures("llama_library")]

EXACT = PRESETS["llama.cpp-exact"]
# Prompt and continuation stay below 32 tokens, so that all share one compiled program.
NEW = 14
PROMPTS = (("def fib(n):", "none"), ("What is 2+2?", "once"), ("Столица Франции —", "none"))


def no_noise(fed: tuple[int, ...], positions: tuple[int, ...]) -> LogitNoise:
    raise AssertionError(f"equal bits need no tolerance, but {len(fed)} tokens led to a difference at {positions[-1]}")


@pytest.fixture(scope="module")
def sides(model_path: Callable[[str], Path]) -> tuple[LocalGenerator, LlamaGenerator]:
    enable_compilation_cache()
    file = open_checkpoint(model_path("qwen2.5-coder-0.5b"))
    return LocalGenerator(file, EXACT), LlamaGenerator(file, EXACT, LlamaOptions(threads=1))


@pytest.mark.parametrize(("text", "times"), PROMPTS)
def test_one_pass_verifies_what_llama_cpp_decodes(
    sides: tuple[LocalGenerator, LlamaGenerator], text: str, times: str
) -> None:
    ours, theirs = sides
    ids = Tokenizer.from_checkpoint(ours.checkpoint).encode(wrap(text, times))  # pyright: ignore[reportArgumentType]
    tokens = TokensReport("test", text, times, tuple(ids))
    report = generate(ours, theirs, tokens=tokens, max_new_tokens=NEW, ignore_stop=True, measure_noise=no_noise)
    assert report.verdict is Verdict.AGREE
    assert len(report.steps) == NEW
    # Equal margins of every step: the logits themselves are equal, not only their order.
    assert [step.model_margin for step in report.steps] == [step.ref_margin for step in report.steps]
    assert (report.continuations["model"].passes.batched, report.continuations["model"].passes.steps) == (1, 0)


def test_llama_cpp_verifies_what_aprjax_decodes(sides: tuple[LocalGenerator, LlamaGenerator]) -> None:
    ours, theirs = sides
    ids = Tokenizer.from_checkpoint(ours.checkpoint).encode(wrap("What is 2+2?", "once"))
    tokens = TokensReport("test", "What is 2+2?", "once", tuple(ids))
    report = generate(theirs, ours, tokens=tokens, max_new_tokens=NEW, measure_noise=no_noise)
    assert report.verdict is Verdict.AGREE
    assert report.continuations["ref"].stop is report.continuations["model"].stop
    assert (report.continuations["ref"].text or "").endswith("<|im_end|>")
    assert [step.model_margin for step in report.steps] == [step.ref_margin for step in report.steps]
