"""The gate's verdicts equal a table worked out by hand and, on any text, a plain reading of the rules."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from aprjax.text import TextError
from aprjax.text.degenerate import gibberish, judge_text, verify_output

from .degenerate_cases import ECHOES, EXPECTED, GATE, RULES


def test_the_table_is_as_large_as_promised_and_every_rule_that_can_decide_is_in_it():
    assert len({case[0] for case in RULES}) >= 60
    assert {case[1] for case in RULES} == {None, "empty", "marker", "non-ascii", "fragment", "nul"}


@pytest.mark.parametrize(("text", "rule", "offset", "why"), RULES)
def test_rules_by_hand(text, rule, offset, why):
    verdict = verify_output(text)
    assert (verdict.rule, verdict.offset) == (rule, offset), why
    assert verdict.passed is (rule is None)


@pytest.mark.parametrize(("text", "rule", "offset", "why"), GATE)
def test_gate_by_hand(text, rule, offset, why):
    verdict = judge_text(text)
    assert (verdict.rule, verdict.offset) == (rule, offset), why


@pytest.mark.parametrize(("text", "prompt", "judged"), ECHOES)
def test_the_prompts_echo_is_taken_away_once_and_only_where_it_is_exact(text, prompt, judged):
    assert judge_text(text, prompt=prompt).judged == judged


@pytest.mark.parametrize(("text", "expected", "passes"), EXPECTED)
def test_expected_substrings(text, expected, passes):
    verdict = judge_text(text, expected=expected)
    assert verdict.passed is passes
    assert verdict.rule == (None if passes else "expected")


@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 65])
def test_share_of_replacement_characters(count):
    # Alone, since within the gate one U+FFFD is a marker already.
    for replaced in (1, 2, 3):
        text = "".join(chr(0x61 + i % 26) for i in range(count - replaced)) + "\ufffd" * replaced
        verdict = gibberish(text)
        expected = count >= 32 and replaced * 32 > count
        assert (verdict is not None and verdict.rule == "replacement") is expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("============", "ruler"),
        ("x = 1\n            y = 2", "white space"),
        ("| a | b | c |\n|---|---|---|\n", "table"),
        ("Столица Франции Париж.", "cyrillic"),
        ("東京は日本の首都であり、人口が多い。", "east asian"),
        ("\ns\ns\ns\ns\ns\ns\ns", None),
        ("!!!!!!!!!!!!", None),
        ("ÃĥÅºÄħëĸ»³Ã¤Å¾Ä‡ÃĥÅº", None),
        ("ëĸп世Äħпß你Äħ好世Åºп¤Å¾", None),
    ],
)
def test_false_positives_are_named_and_degeneration_is_not_excused(text, word):
    verdict = verify_output(text)
    assert not verdict.passed
    risk = verdict.false_positive_risk
    assert risk is None if word is None else risk is not None and word in risk


def test_bytes_that_are_no_utf8_are_replaced_as_upstream_does_and_surrogates_are_refused():
    # Two maximal subparts: E4 BD, and FF. Each is one U+FFFD.
    verdict = judge_text(b"a\xe4\xbd\xffb")
    assert (verdict.rule, verdict.offset, verdict.judged) == ("marker", 1, "a\ufffd\ufffdb")
    with pytest.raises(TextError, match=r"U\+D800 at character 2"):
        judge_text("ab\ud800")


def test_verdict_is_json():
    verdict = judge_text(b"\0" * 3 + "é".encode())
    assert json.loads(json.dumps(verdict.to_json())) == verdict.to_json()
    assert verdict.to_json()["detail"] == "3 NUL bytes, the first at byte 0"


def by_the_book(text: str) -> tuple[str | None, int | None]:
    """Rule and offset, by loops over the definition."""
    if all(character in "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" or "\u2000" <= character <= "\u200a"
           for character in text):  # fmt: skip
        return "empty", None
    data = text.encode()
    for marker in ("\ufffd".encode(), b"[UNK]", b"akunji", b"olumbia"):
        for offset in range(len(data) - len(marker) + 1):
            if data[offset : offset + len(marker)] == marker:
                return "marker", offset
    count = len(text)
    # Whole numbers: more than 60 %.
    if count >= 16 and 100 * sum(ord(character) > 127 for character in text) > 60 * count:
        return "non-ascii", None
    if len(data) >= 12:
        for length in range(4, min(16, len(data) // 3) + 1):
            for offset in range(len(data) - 3 * length + 1):
                copies = [data[offset + k * length : offset + (k + 1) * length] for k in range(3)]
                if copies[0] == copies[1] == copies[2]:
                    return "fragment", offset
    if 0 in data:
        return "nul", data.index(0)
    return None, None


# Repetitions with a beginning and an end that break them, and the thresholds' neighbourhood.
_pieces = st.one_of(
    st.text(alphabet="ab\ns =é你😀", max_size=5),
    st.text(max_size=3).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
    st.sampled_from(("[UNK]", "akunji", "\ufffd", "\0", " ", "\u3000")),
)
_texts = st.lists(st.tuples(_pieces, st.integers(1, 6)), max_size=6).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


@given(text=_texts)
@example(text="\0" * 12)
@example(text="你" * 9 + "abcdef")
@settings(max_examples=200, deadline=None)
def test_any_text_is_judged_by_the_book(text):
    verdict = verify_output(text)
    assert (verdict.rule, verdict.offset) == by_the_book(text)
