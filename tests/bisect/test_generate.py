"""What `generate` decides, on sides made of tables: who decodes, where two part, and what noise explains."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from generating import PROMPT, SIZE, STOP, Noise, Table, bare_checkpoint, but, counting
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from text.synthetic import small_vocabulary

from aprjax.bisect.generate.compare import generate
from aprjax.bisect.generate.html import summary_html
from aprjax.bisect.generate.render import print_reports
from aprjax.bisect.generate.report import GenerateReport, Kind
from aprjax.bisect.generate.text import Words, vocabulary_findings
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.qwen2 import PRESETS
from aprjax.text import Tokenizer
from aprjax.trace.generation import Stop, likeliest, rank_of

ASKED = TokensReport("test", None, "none", PROMPT)


def compare(model: Table, ref: Table, noise: Noise | None = None, count: int = 12, **options: object) -> GenerateReport:
    settings = {"max_new_tokens": count, "measure_noise": noise or Noise(), **options}
    return generate(model, ref, tokens=ASKED, **settings)  # pyright: ignore[reportArgumentType]


def push(token: int, to: float) -> Callable[[np.ndarray], None]:
    """Sets one logit."""

    def change(row: np.ndarray) -> None:
        row[token] = to

    return change


def test_two_sides_that_agree_cost_one_decoding_and_one_pass() -> None:
    model, ref, noise = Table(), Table(), Noise()
    report = compare(model, ref, noise)
    assert (report.verdict, report.first_difference) == (Verdict.AGREE, None)
    assert report.reason == "both sides choose the same 12 tokens, as many as were asked for"
    assert ref.calls == ["generate 3"]
    assert model.calls == ["score 3+12"]
    assert noise.asked == []
    assert report.continuations["model"].passes.steps == 0
    assert [step.position for step in report.steps] == list(range(2, 14))
    assert {step.model_margin for step in report.steps} == {5.0}
    assert report.prompt.positions == tuple(range(2, 14))


def test_a_divergence_is_decoded_on_from_the_first_other_choice() -> None:
    model, ref = Table(but(counting, 4, push(30, 9.0))), Table()
    report = compare(model, ref)
    first = report.first_difference
    assert report.verdict is Verdict.DIVERGENCE
    assert first is not None
    assert (first.step, first.position, first.kind) == (4, 6, Kind.TOKEN)
    assert (first.model.gap, first.model.rank, first.model.margin.top1) == (4.0, 2, 30)  # pyright: ignore
    assert first.ref.margin is not None
    assert first.ref.margin.top1 == 7
    # Token 30 is far down the reference's list: its rank is looked up.
    assert first.ref.rank == rank_of(counting(tuple(range(7))), 30)
    assert first.ref.gap == pytest.approx(5 - counting(tuple(range(7)))[30])
    assert model.calls == ["score 3+12", "generate 8"]
    assert ref.calls == ["generate 3", "score 7+1"]
    assert report.continuations["ref"].passes.batched == 2
    assert report.continuations["model"].tokens == (3, 4, 5, 6, 30, 8, 9, 10, 11, 12, 13, 14)
    assert len(report.steps) == 4
    assert "more than the noise" in report.reason
    assert "the first 4 of `continuations.ref.tokens`" in report.next_step
    # Decoding by itself, the model too has to look up a choice that is far down its list.
    model = Table(but(counting, 4, push(30, 9.0)))
    hidden = compare(model, Table(but(counting, 4, push(38, 9.0))), step_by_step=True)
    assert model.calls == ["forget", "generate 3", "score 7+1"]
    assert hidden.continuations["model"].passes.batched == 2


def test_a_near_tie_is_within_the_noise_as_both_see_it() -> None:
    model = Table(but(counting, 4, push(30, 5.02)))
    ref = Table(but(counting, 4, push(30, 4.99)))
    noise = Noise(0.01)
    report = compare(model, ref, noise)
    assert report.verdict is Verdict.NEAR_TIE
    assert report.verdict.exit_code == 0
    first = report.first_difference
    assert first is not None
    assert first.gap == pytest.approx(0.02, abs=1e-6)
    assert first.gap_in_sigmas == pytest.approx(2.0, abs=1e-4)
    assert noise.asked == [((1, 2, 3, 3, 4, 5, 6), tuple(range(7)))]
    # Where the model is sure of its own choice, the reference's doubt is no excuse.
    sure = compare(Table(but(counting, 4, push(30, 6.0))), ref, noise)
    assert sure.verdict is Verdict.DIVERGENCE


def test_two_arithmetics_are_named_beside_a_difference() -> None:
    changed = but(counting, 4, push(30, 9.0))
    report = compare(Table(changed, arithmetic=PRESETS["float32"]), Table())
    assert report.reason.endswith("; the model computes in float32 arithmetic, the reference in llama.cpp")
    assert "computes in" not in compare(Table(changed), Table()).reason
    assert "computes in" not in compare(Table(arithmetic=PRESETS["float32"]), Table()).reason


def test_a_third_choice_is_no_near_tie() -> None:
    def three(row: np.ndarray) -> None:
        row[30], row[31] = 4.99, 4.995

    report = compare(Table(but(counting, 4, push(30, 5.01))), Table(but(counting, 4, three)), Noise(1.0))
    first = report.first_difference
    assert first is not None
    assert (first.model.rank, first.ref.rank) == (2, 3)
    assert report.verdict is Verdict.DIVERGENCE
    assert report.reason.endswith("the reference ranks the model's choice 3")


def test_what_only_batching_rounds_otherwise_is_decoded_before_it_is_reported() -> None:
    flipped = but(counting, 4, push(30, 5.01))
    model, noise = Table(counting, at_once=flipped), Noise(0.01)
    report = compare(model, Table(), noise)
    assert model.calls == ["score 3+12", "forget", "generate 3"]
    assert report.verdict is Verdict.AGREE
    assert len(noise.asked) == 1
    # And where decoding confirms it, it is reported, and how it was found.
    model = Table(flipped, at_once=flipped)
    report = compare(model, Table(but(counting, 4, push(30, 4.99))), noise)
    assert report.first_difference is not None
    assert report.first_difference.confirmed == "step by step"
    assert report.verdict is Verdict.NEAR_TIE
    # A difference that no rounding explains needs no confirmation.
    model = Table(but(counting, 4, push(30, 9.0)), at_once=but(counting, 4, push(30, 9.0)))
    report = compare(model, Table(), noise)
    assert model.calls == ["score 3+12", "generate 8"]
    assert report.verdict is Verdict.DIVERGENCE


def test_step_by_step_the_model_decodes_by_itself() -> None:
    model = Table()
    report = compare(model, Table(), step_by_step=True)
    assert model.calls == ["forget", "generate 3"]
    assert report.verdict is Verdict.AGREE


def test_equal_bytes_under_one_arithmetic_are_computed_once() -> None:
    model = Table()
    report = compare(model, Table(), shared="the same")
    assert model.calls == []
    assert report.verdict is Verdict.AGREE
    assert report.continuations["model"].passes.tokens == 0
    assert report.continuations["model"].tokens == report.continuations["ref"].tokens


@pytest.mark.parametrize("shared", ["", "the same"])
@pytest.mark.parametrize("step_by_step", [False, True])
def test_other_stop_tokens_are_the_difference(shared: str, step_by_step: bool) -> None:
    eight = frozenset((8,))
    never: frozenset[int] = frozenset()
    options = {"shared": shared, "step_by_step": step_by_step}
    report = compare(Table(stop_ids=never), Table(stop_ids=eight), **options)
    first = report.first_difference
    assert first is not None
    assert (first.kind, first.step, report.verdict) == (Kind.STOP, 5, Verdict.DIVERGENCE)
    assert report.continuations["ref"].tokens == (3, 4, 5, 6, 7, 8)
    assert report.continuations["model"].tokens == tuple(range(3, 15))
    assert "ends the reference's answer and not the model's" in report.reason
    report = compare(Table(stop_ids=eight), Table(stop_ids=never), **options)
    assert "ends the model's answer and not the reference's" in report.reason
    assert report.continuations["model"].stop is Stop.TOKEN
    assert len(report.steps) == 6
    for ignored in (Table(stop_ids=never), Table(stop_ids=eight)):
        report = compare(ignored, Table(stop_ids=eight), ignore_stop=True, **options)
        assert report.verdict is Verdict.AGREE
        assert len(report.continuations["model"].tokens) == 12
    assert compare(Table(stop_ids=eight), Table(stop_ids=eight), **options).verdict is Verdict.AGREE


@pytest.mark.parametrize("step_by_step", [False, True])
def test_an_answer_that_has_ended_is_not_compared_further(step_by_step: bool) -> None:
    changed = but(counting, 8, push(30, 9.0))
    model = Table(changed, stop_ids=frozenset((8,)))
    report = compare(model, Table(), step_by_step=step_by_step)
    assert report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.step) == (Kind.STOP, 5)
    assert report.continuations["model"].tokens == (3, 4, 5, 6, 7, 8)


def test_a_difference_at_the_last_token_and_at_a_stop_token() -> None:
    report = compare(Table(but(counting, 11, push(30, 9.0))), Table())
    assert report.first_difference is not None
    assert report.first_difference.step == 11
    assert len(report.continuations["model"].tokens) == 12
    model = Table(but(counting, 4, push(STOP, 9.0)))
    report = compare(model, Table())
    assert report.continuations["model"].tokens == (3, 4, 5, 6, STOP)
    assert report.continuations["model"].stop is Stop.TOKEN
    assert model.calls == ["score 3+12"]


def test_logits_that_are_no_numbers_are_never_an_agreement() -> None:
    broken = but(counting, 4, push(20, np.nan))
    report = compare(Table(broken), Table())
    assert report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.step) == (Kind.NOT_FINITE, 4)
    assert report.verdict is Verdict.DIVERGENCE
    assert report.reason.endswith("on the model's side")
    assert compare(Table(), Table(broken)).reason.endswith("on the reference's")
    both = compare(Table(broken), Table(broken))
    assert both.verdict is Verdict.UNMEASURED
    for shown in (report, both):
        json.dumps(shown.to_json(), allow_nan=False)


def test_tokenizers_and_vocabularies_that_differ_decide_the_verdict() -> None:
    differs = replace(ASKED, agree=False, reason="the tokenizers disagree")
    report = generate(Table(), Table(), tokens=differs, max_new_tokens=3, measure_noise=Noise())
    assert (report.verdict, report.reason) == (Verdict.DIVERGENCE, "the tokenizers disagree")
    vocabulary = small_vocabulary()
    other = replace(vocabulary, tokens=(*vocabulary.tokens[:4], "zzz", *vocabulary.tokens[5:]))
    sides = bare_checkpoint(other), bare_checkpoint(vocabulary)
    report = compare(Table(checkpoint=sides[0]), Table(checkpoint=sides[1]))
    assert report.verdict is Verdict.DIVERGENCE
    assert "token 4 is 'zzz' in the model" in report.reason
    (unused,) = vocabulary_findings(*sides, used={1, 2})
    assert unused.severity == "info"
    assert vocabulary_findings(sides[0], sides[0], used={4}) == ()


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(Tokenizer(small_vocabulary()))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), cut=st.integers(0, 40), other=st.text(max_size=4))
def test_texts_are_cut_between_characters(words: Words, text: str, cut: int, other: str) -> None:
    assert words.tokenizer is not None
    ids = tuple(words.tokenizer.encode(text.encode("utf-8", "ignore").decode(), parse_special=False))
    rest = tuple(words.tokenizer.encode(other.encode("utf-8", "ignore").decode(), parse_special=False))
    common, (one, two) = words.aligned(ids[:cut], (ids[cut:], rest))
    assert common is not None
    assert "\ufffd" not in common.replace("\ufffd", "", text.count("\ufffd"))
    assert common + (one or "") == words.text(ids)
    assert two is not None
    assert two.endswith(other.encode("utf-8", "ignore").decode())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("nan"), float("-inf")]), min_size=1, max_size=30))
def test_the_likeliest_are_sorted_and_lower_ids_win(values: list[float]) -> None:
    row = np.array(values, np.float32)
    ids, logits, finite = likeliest(row)
    assert finite == bool(np.isfinite(row).all())
    ordered = sorted(range(len(values)), key=lambda i: (-(row[i] if not np.isnan(row[i]) else -np.inf), i))
    assert list(ids) == ordered[:10]
    assert not np.isnan(logits).any()
    if finite:
        assert [rank_of(row, int(token)) for token in ids] == list(range(1, len(ids) + 1))


def test_the_report_shows_itself_everywhere() -> None:
    checkpoint = bare_checkpoint(small_vocabulary())
    model = Table(but(counting, 4, push(30, 9.0)), checkpoint=checkpoint)
    report = compare(model, Table(checkpoint=checkpoint))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["schema"] == "aprjax.generate/1"
    assert document["common_tokens"] == 4
    assert document["first_difference"]["ref"]["rank"] > 10
    assert document["first_difference"]["pieces"] == [repr(chr(30))[1:-1], repr(chr(7))[1:-1]]
    assert document["common_text"] + document["continuations"]["model"]["rest"] == "\3\4\5\6\x1e\b\t\n\v\f\r\x0e"
    assert [row["step"] for row in report.top(2)] == [0, 1]
    assert list(report.to_frame()["token"]) == [3, 4, 5, 6]
    assert "new token 5" in summary_html(report) == report._repr_html_()
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False)
    print_reports([report], console)
    shown = console.export_text()
    assert "DIVERGENCE at new token 5" in shown
    assert "ref goes on" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_nothing_to_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare(Table(), Table(), count=0)


def test_a_row_of_the_head_beyond_the_vocabulary_is_spelled_out(words: Words) -> None:
    assert words.piece(10**6) == "<id 1000000>"
    assert (words.text((10**6,)) or "").endswith("<id 1000000>")
    assert SIZE < 10**6
