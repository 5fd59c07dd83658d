"""`bisect tokens` names what is planted in a pair of small vocabularies, and blames nothing on a clean pair."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from text.synthetic import checkpoint_of, small_vocabulary

from aprjax.bisect.open_sides import Opened
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.compare import compare_tokens
from aprjax.bisect.tokens.render import render, shown_rows
from aprjax.bisect.tokens.report import Cause, TokensComparison
from aprjax.checkpoint.types import Checkpoint, CheckpointError, Vocabulary
from aprjax.text import PROBES, Tokenizer, wrap
from aprjax.trace.engine import EngineError
from aprjax.trace.llama_cpp_text import LlamaText
from aprjax.trace.memory import MemoryTrace
from aprjax.trace.sides import Side
from aprjax.trace.trace import TraceInfo

# Qwen2.5's template, but for tools: a system turn of its own where the conversation has none.
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VOCABULARY = small_vocabulary()
START, END = (VOCABULARY.tokens.index(text) for text in ("<|im_start|>", "<|im_end|>"))
PADDING = VOCABULARY.tokens.index("[PAD7]")


def checkpoint(vocabulary: Vocabulary | None = VOCABULARY, template: str | None = None) -> Checkpoint:
    # Without a template, unless the test is about it: rendering starts a process.
    made = checkpoint_of(vocabulary, template)
    return replace(made, config=replace(made.config, vocab_size=len(VOCABULARY.tokens)))


def opened(model: Checkpoint, kind: Any = "checkpoint") -> Opened:
    return Opened(Side(kind, str(model.path), model.path, checkpoint=model), model)


def recorded(tokens: list[int], file: Checkpoint | None) -> Opened:
    info = TraceInfo("run.gguf", "", "gguf", "llama.cpp", tuple(tokens), (), (), "x86_64 cpu", {})
    path = Path("trace.safetensors")
    return Opened(Side("trace", str(path), path, recorded=MemoryTrace(info, {})), file)


def compare(model: Checkpoint | Opened, ref: Checkpoint | Opened | None = None, **asked: Any) -> TokensComparison:
    sides = [side if isinstance(side, Opened) else opened(side) for side in (model, ref or checkpoint())]
    asked.setdefault("engine", False)
    report = compare_tokens((sides[0], sides[1]), **asked)
    json.dumps(report.to_json(), allow_nan=False)
    return report


def ids_of(report: TokensComparison, severity: str = "error") -> set[str]:
    return {finding.id for finding in report.findings if finding.severity == severity}


@pytest.mark.parametrize("wrapped", ["none", "once"])
@pytest.mark.parametrize("text", ["What is 2+2?", "a\n\n\nb <tool_call> 👩\u200d👩 你好\u3000世界", "</s>x"])
def test_a_clean_pair_blames_nothing(text, wrapped):
    report = compare(checkpoint(), text=text, times=wrapped)
    assert (report.verdict, report.causes, ids_of(report)) == (Verdict.AGREE, (), set())
    (prompt,) = report.prompts
    assert prompt.model.ids == tuple(Tokenizer(VOCABULARY).encode(wrap(text, wrapped)))
    assert prompt.first_difference is None


def test_byte_offsets_and_pieces_are_those_of_the_fed_text():
    text = "你好 <|im_start|>naïve"
    (prompt,) = compare(checkpoint(), text=text).prompts
    data = text.encode()
    assert prompt.model.text == text
    assert [token.start for token in prompt.model.tokens[1:]] == [token.end for token in prompt.model.tokens[:-1]]
    assert prompt.model.tokens[-1].end == len(data)
    special = next(token for token in prompt.model.tokens if token.id == START)
    assert data[special.start : special.end] == b"<|im_start|>"
    assert special.kind == "control"


def test_without_a_prompt_the_probes_are_compared():
    report = compare(checkpoint())
    assert [prompt.name for prompt in report.prompts] == [probe.name for probe in PROBES]
    assert report.verdict is Verdict.AGREE


def exchanged(first: int, second: int) -> Vocabulary:
    tokens = list(VOCABULARY.tokens)
    tokens[first], tokens[second] = tokens[second], tokens[first]
    return replace(VOCABULARY, tokens=tuple(tokens))


def retyped(index: int) -> Vocabulary:
    types = list(VOCABULARY.token_types)
    types[index] = 1
    return replace(VOCABULARY, token_types=tuple(types))


def renamed(index: int, text: str) -> Vocabulary:
    tokens = list(VOCABULARY.tokens)
    tokens[index] = text
    return replace(VOCABULARY, tokens=tuple(tokens))


FEWER_MERGES = replace(VOCABULARY, merges=VOCABULARY.merges[:-40])
FAULTS = [
    ("special ids", exchanged(START, END), Cause.SPECIAL_IDS, "special-id-differs"),
    ("wrong EOS", replace(VOCABULARY, eos_token_id=START), Cause.SPECIAL_IDS, "eos-id-wrong"),
    ("other EOS", replace(VOCABULARY, eos_token_id=VOCABULARY.bos_token_id), Cause.SPECIAL_IDS, "eos-id-differs"),
    ("no EOS", replace(VOCABULARY, eos_token_id=None), Cause.STOP_TOKENS, "eos-missing"),
    ("ordinary start", retyped(START), Cause.SPECIAL_AS_TEXT, "special-token-as-text"),
    ("add_bos", replace(VOCABULARY, add_bos=True), Cause.BOS, "add-bos-differs"),
    ("ordinary ids", exchanged(40, 50), Cause.VOCABULARY, "vocabulary-differs"),
    ("merges", FEWER_MERGES, Cause.VOCABULARY, "merges-differ"),
    ("renamed start", renamed(START, "<|im_begin|>"), Cause.SPECIAL_AS_TEXT, "special-token-absent"),
]


@pytest.mark.parametrize(("vocabulary", "cause", "finding"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_named_and_nothing_else(vocabulary, cause, finding):
    report = compare(checkpoint(vocabulary), text="What is 2+2?", times="once")
    assert report.verdict is Verdict.DIVERGENCE
    assert report.causes == (cause,)
    assert finding in ids_of(report)
    assert str(cause) in report.reason


def test_padding_and_the_templates_text_are_no_faults():
    tokens = (*VOCABULARY.tokens[:PADDING], "<|pad_7|>", *VOCABULARY.tokens[PADDING + 1 :])
    other = checkpoint(replace(VOCABULARY, tokens=tokens), TEMPLATE + "{# the same #}")
    report = compare(other, checkpoint(template=TEMPLATE), text="hi", times="once")
    assert (report.verdict, ids_of(report)) == (Verdict.AGREE, set())
    assert "template-texts-differ" in ids_of(report, "info")


@pytest.mark.parametrize(("text", "wrapped"), [(wrap("hi", "once"), "once"), (wrap("hi", "twice"), "none")])
def test_a_prompt_wrapped_twice_is_the_cause(text, wrapped):
    report = compare(checkpoint(), text=text, times=wrapped)
    assert (report.verdict, report.causes) == (Verdict.DIVERGENCE, (Cause.DOUBLE_WRAP,))
    (finding,) = [f for f in report.findings if f.id == "prompt-wrapped-twice"]
    assert "byte 17" in finding.message
    assert "'hi'" in finding.message
    assert finding.side == "both"
    assert report.template is not None
    assert report.template.user == "hi"


def test_wrapping_twice_on_purpose_is_named_without_a_divergence():
    report = compare(checkpoint(), text="hi", times="twice")
    assert (report.verdict, report.causes) == (Verdict.AGREE, (Cause.DOUBLE_WRAP,))
    assert "as asked" in report.reason


def test_a_wrapped_prompt_is_fed_as_it_is_and_upstreams_wrapping_is_mentioned():
    report = compare(checkpoint(), text=wrap("hi", "once"))
    assert (report.verdict, report.causes) == (Verdict.AGREE, ())
    assert "prompt-wrapped" in ids_of(report, "info")


def test_a_trace_that_was_fed_the_prompt_wrapped_once_more():
    tokenizer = Tokenizer(VOCABULARY)
    trace = recorded(tokenizer.encode(wrap("hi", "twice")), checkpoint())
    report = compare(trace, text="hi", times="once")
    assert (report.verdict, report.causes) == (Verdict.DIVERGENCE, (Cause.DOUBLE_WRAP,))
    first = report.prompts[0].first_difference
    assert first is not None
    assert "model's side is the other one's prompt wrapped once more" in first.explanation
    # `<|im_start|>user` and the line end are common, then a second turn opens.
    assert tokenizer.decode(tokenizer.encode(wrap("hi", "twice"))[: first.position]) == "<|im_start|>user\n"
    assert report.prompts[0].model.source == "trace"


def test_a_trace_without_a_prompt_is_compared_by_its_own_text():
    ids = Tokenizer(VOCABULARY).encode(wrap("2+2", "once"))
    assert compare(recorded(ids, None)).verdict is Verdict.AGREE
    report = compare(recorded([ids[0], *ids], None))
    assert report.verdict is Verdict.DIVERGENCE
    # The same text, but cut otherwise than any tokenizer here cuts it.
    pair = next(token for token in VOCABULARY.tokens if len(token) == 2 and token.isascii() and token.isalpha())
    other = compare(recorded([*map(VOCABULARY.tokens.index, pair), *ids], None))
    assert other.causes == (Cause.TOKENS,)


def test_double_bos():
    bos = VOCABULARY.bos_token_id
    assert compare(checkpoint(), ids=[bos, bos, 5]).causes == (Cause.BOS,)
    asks = checkpoint(replace(VOCABULARY, add_bos=True))
    report = compare(asks, asks, text="<|endoftext|>hi")
    assert report.causes == (Cause.BOS,)
    assert ids_of(report) == {"double-bos"}
    assert compare(asks, asks, text="hi").causes == ()


def test_ids_that_no_text_has():
    report = compare(checkpoint(), ids=[5, PADDING, 99999])
    assert report.causes == (Cause.PADDING,)
    assert [token.kind for token in report.prompts[0].ref.tokens] == ["normal", "padding", "outside"]


@pytest.mark.parametrize(
    ("text", "finding", "words"),
    [
        ("zero\u200bwidth", "prompt-invisible", "U+200B ZERO WIDTH SPACE at byte 4"),
        ("<｜im_start｜>user", "prompt-special-look-alike", "looks like <|im_start|>"),
        ("a\u00a0b", "prompt-space", "U+00A0"),
        ("bell\x07", "prompt-control", "U+0007 at byte 4"),
        ("p\u0430ypal", "prompt-look-alike", "looks like 'a'"),
        ("<|im_begin|>user", "special-token-unknown", "did you mean <|im_"),
    ],
)
def test_oddities_of_the_prompt_warn_and_blame_nobody(text, finding, words):
    report = compare(checkpoint(), text=text)
    assert report.causes == ()
    assert any(f.id == finding and words in f.message for f in report.findings)


def test_templates():
    sound = checkpoint(template=TEMPLATE)
    report = compare(sound, sound, text="hi")
    template = report.template
    assert template is not None
    assert template.ref == "<|im_start|>system\nBe kind.<|im_end|>\n" + template.wrapped
    assert "+<|im_start|>system\n+Be kind.<|im_end|>\n" in template.wrap_diff
    assert template.diff == ""
    assert "template-system-turn" in ids_of(report, "info")
    report = compare(checkpoint(template=TEMPLATE.replace("kind", "brief")), sound, text="hi")
    assert report.causes == (Cause.TEMPLATE,)
    assert report.template is not None
    assert "-Be kind.<|im_end|>\n+Be brief.<|im_end|>\n" in report.template.diff
    report = compare(checkpoint(template="{{ raise_exception('no') }}"), text="hi")
    assert report.causes == (Cause.TEMPLATE,)
    assert any(f.id == "template-error" and f.side == "model" and "no" in f.message for f in report.findings)
    report = compare(checkpoint(template=None), text="hi")
    assert report.causes == ()
    assert "template-missing" in ids_of(report, "warning")


def test_a_side_without_a_tokenizer_is_unmeasured_and_two_are_refused():
    report = compare(checkpoint(None), text="hi")
    assert (report.verdict, report.causes) == (Verdict.UNMEASURED, (Cause.TOKENIZER_MISSING,))
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert "PMAT-172" in finding.message
    assert "GH-185" in (finding.reference or "")
    assert "--tokens" in finding.message
    with pytest.raises(CheckpointError, match="PMAT-172"):
        compare(checkpoint(None), checkpoint(None), text="hi")


def test_prompts_that_cannot_be_encoded():
    with pytest.raises(CheckpointError, match="no tokens"):
        compare(checkpoint(), text="")
    with pytest.raises(CheckpointError, match=r"U\+DCFF"):
        compare(checkpoint(), text="a\udcff")


def answer(**changed: Any) -> LlamaText:
    stops = tuple(sorted(Tokenizer(VOCABULARY).stop_ids))
    ids = (tuple(Tokenizer(VOCABULARY).encode("hi")),)
    return replace(LlamaText(ids, (), 0, 0, 0, False, stops, None, {"llama_cpp_python": "0"}), **changed)


def test_what_llama_cpp_says():
    report = compare(checkpoint(), text="hi", engine=True, ask=lambda *_, **__: answer())
    assert (report.verdict, report.engine) == (Verdict.AGREE, dict.fromkeys(("model", "ref"), "llama-cpp-python 0"))
    other = compare(checkpoint(), text="hi", engine=True, ask=lambda *_, **__: answer(ids=((1, 2),)))
    assert other.causes == (Cause.TOKENIZER,)
    warned = compare(checkpoint(), text="hi", engine=True, ask=lambda *_, **__: answer(added=(7,), stop_ids=(1,)))
    assert {"llama-cpp-adds-bos", "llama-cpp-stops-differ"} <= ids_of(warned, "warning")

    def absent(*_: Any, **__: Any) -> LlamaText:
        raise EngineError("llama-cpp-python is not installed")

    report = compare(checkpoint(), text="hi", engine=True, ask=absent)
    assert (report.verdict, report.engine["ref"]) == (Verdict.AGREE, "llama-cpp-python is not installed")
    # As a side it is what was asked for, and its ids are its own.
    with pytest.raises(EngineError):
        compare(opened(checkpoint(), "llama.cpp"), text="hi", engine=False, ask=absent)
    report = compare(opened(checkpoint(), "llama.cpp"), text="hi", ask=lambda *_, **__: answer(ids=((1, 2),)))
    assert report.prompts[0].model.source == "llama.cpp"
    assert report.causes == (Cause.TOKENS,)


def test_rows_frames_and_the_terminal():
    report = compare(checkpoint(retyped(START)), text="x" * 200 + "<|im_start|>" + "y", times="none")
    rows = report.rows()
    # Pieces stand beside the token that they make up, and what follows is in step again.
    assert next(row["model_text"] for row in rows if not row["same"]) == "<"
    assert rows[-1]["same"]
    assert rows[-1]["ref_start"] == 212
    assert report.top(1)[0]["ref_text"] == "<|im_start|>"
    assert list(report.to_frame().columns) == list(rows[0])
    start, stop = shown_rows(report.prompts[0])
    assert any(not row["same"] for row in rows[start:stop])
    assert start > 0
    console = Console(width=80, record=True, file=StringIO())
    render(report, console)
    text = console.export_text()
    assert "DIVERGENCE" in text
    assert "special-token-as-text" in text
    assert "<|im_start|>" in report._repr_html_().replace("&lt;", "<").replace("&gt;", ">")
