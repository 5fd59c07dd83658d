"""The five causes of bad ChatML output, planted in the real 0.5B: each is named, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprjax.bisect.chatml.command import Asked, AsRun, run_chatml
from aprjax.bisect.chatml.prompts import chosen_prompts, own_prompt
from aprjax.bisect.chatml.report import ChatmlReport
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.text import wrap

pytestmark = pytest.mark.real_model

EMBEDDING = "model.embed_tokens.weight"
END_OF_TEXT, START, END = 151643, 151644, 151645
SUM = Asked(chosen_prompts(["two-plus-two"]), ("none", "once"), ("float32",), max_new_tokens=10, noise=False)


@pytest.fixture(scope="module")
def reference(model_path: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(model_path("qwen2.5-coder-0.5b"))


@pytest.fixture(scope="module")
def judge(reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatmlReport]:
    """Judges a model by the reference; the reference's runs are made once."""
    state = tmp_path_factory.mktemp("state")
    return lambda model, asked=SUM: run_chatml(model, reference, asked, state=state)


def as_another_file(checkpoint: Checkpoint) -> Checkpoint:
    """Finished runs are filed by the file's digest, which a change in memory does not change."""
    checkpoint.__dict__["_sha256"] = "another"
    return checkpoint


def supported(report: ChatmlReport) -> set[str]:
    return {claim.id for claim in report.claims if claim.verdict == "supported"}


def test_a_clean_pair_is_alike(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    report = judge(reference)
    assert (report.verdict, report.exit_code, report.causes.blamed) == ("alike", 0, ())
    assert supported(report) == set()
    answer = report.cells["model", "two-plus-two", "once", "float32", "on"]
    # What transformers answers in float32 (the design's facts).
    assert (answer.text, answer.stop_token, answer.state) == ("2 + 2 equals 4.", END, "clean")
    assert answer.shared_with
    beyond = report.cells["ref", "two-plus-two", "once", "float32", "off"]
    assert beyond.tokens[: len(answer.tokens) + 1] == (*answer.tokens, END)
    assert len(beyond.tokens) == 10


def test_a_double_wrapped_prompt_is_named(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    """What upstream fed in PRED-61-A: a prompt written out as ChatML, which `apr run` wrapped once more."""
    prompt = own_prompt(wrap(wrap("Hello, my name is")))
    asked = replace(SUM, prompts=(prompt,), wraps=("once",), as_run=AsRun(wraps=("twice", "once")))
    report = judge(reference, asked)
    assert (report.verdict, report.causes.blamed) == ("part", ("double wrapping",))
    assert supported(report) == {"double-wrapping"}
    assert {finding.id for finding in report.findings if finding.severity == "error"} == {"prompt-double-wrapped"}


def test_drift_of_quantized_activations_is_named(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    """One file; the model's side quantizes its activations in blocks. `def fib(n):` ends in a near-tie."""
    asked = Asked(
        chosen_prompts(["fib"]),
        ("none",),
        ("float32",),
        max_new_tokens=4,
        as_run=AsRun(arithmetics=("llama.cpp", "float32")),
        noise=False,
    )
    report = judge(reference, asked)
    assert (report.verdict, report.causes.blamed) == ("part", ("drift",))
    assert supported(report) == {"drift"}
    parting = report.causes.partings[0]
    assert (parting.kind, parting.step) == ("unknown", 0)
    assert parting.gap is not None
    # The near-tie that the design speaks of: 198 against 220.
    assert {parting.model_token, parting.ref_token} == {198, 220}
    assert 0 < parting.gap < 0.1
    # Asked of the pair at equal arithmetic, the same runs accuse nobody.
    assert judge(reference, replace(asked, arithmetics=("float32", "llama.cpp"), as_run=AsRun())).verdict == "alike"


def test_a_missing_stop_token_is_named(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    assert reference.vocabulary is not None
    report = judge(replace(reference, vocabulary=replace(reference.vocabulary, eos_token_id=None)))
    assert (report.verdict, report.causes.blamed) == ("part", ("stop tokens",))
    assert supported(report) == {"stop-tokens"}
    # Engines that go by the token's name are not affected, and without stop tokens both run on alike.
    assert {parting.comparison.model.stop for parting in report.causes.partings} == {"declared"}


def test_a_corrupted_row_of_im_start_is_named(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    tensor = reference.tensors[EMBEDDING]
    packed = np.array(tensor.packed())
    packed[START] = packed[0]
    corrupted = replace(tensor, data=packed.reshape(-1))
    report = judge(as_another_file(replace(reference, tensors={**reference.tensors, EMBEDDING: corrupted})))
    assert (report.verdict, report.causes.blamed) == ("part", ("special-token rows",))
    assert report.factorial.facts.special_rows == ("<|im_start|>",)
    assert supported(report) == {"special-tokens"}
    assert {parting.comparison.model.wrap for parting in report.causes.partings} == {"once"}


def with_exchanged(checkpoint: Checkpoint, first: int, second: int) -> Checkpoint:
    """The checkpoint with two tokens' ids exchanged in the vocabulary, and all weights as they were."""
    assert checkpoint.vocabulary is not None
    tokens = list(checkpoint.vocabulary.tokens)
    tokens[first], tokens[second] = tokens[second], tokens[first]
    return replace(checkpoint, vocabulary=replace(checkpoint.vocabulary, tokens=tuple(tokens)))


def test_a_wrong_id_of_a_special_token_is_named(reference: Checkpoint, judge: Callable[..., ChatmlReport]) -> None:
    report = judge(with_exchanged(reference, START, END_OF_TEXT))
    assert (report.verdict, report.causes.blamed) == ("part", ("special-token ids",))
    assert [names for names, _, _ in report.factorial.facts.special_ids] == ["<|endoftext|>", "<|im_start|>"]
    assert supported(report) == {"special-tokens"}
    assert reference.vocabulary is not None
    wrong = replace(reference, vocabulary=replace(reference.vocabulary, eos_token_id=START))
    assert judge(wrong).causes.blamed == ("special-token ids",)


def test_a_wrong_id_that_changes_no_answer_is_a_finding_and_blamed_for_nothing(
    reference: Checkpoint, judge: Callable[..., ChatmlReport]
) -> None:
    """The rows of the two turn markers are nearly the same (cosine 0.94): these weights answer alike by either."""
    report = judge(with_exchanged(reference, START, END))
    assert (report.verdict, report.causes.blamed) == ("alike", ())
    assert "special-token-id-differs" in {finding.id for finding in report.findings if finding.severity == "error"}
    claim = next(claim for claim in report.claims if claim.id == "special-tokens")
    assert claim.verdict == "refuted"
    assert "<|im_start|>, <|im_end|>" in claim.reason
