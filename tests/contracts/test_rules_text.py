"""Tokenizers and templates: a clean pair keeps every rule, and each fault in a file breaks one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from contract_sides import TEMPLATE, MadeUpBench, outcome, statuses
from tiny import CONFIG, VOCABULARY, tiny_checkpoint

from aprjax.bisect.open_sides import Opened
from aprjax.bisect.tokens.compare import compare_tokens
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.types import Status

TOKENIZERS = tuple(f"APRJAX-TOKENIZER-00{number}" for number in (2, 3, 4, 5))
TEMPLATES = ("FALSIFY-CHAT-001", "FALSIFY-CHAT-003", "FALSIFY-CHAT-762", "GATE-CHAT-SHIP-008")


def clean() -> Checkpoint:
    return replace(tiny_checkpoint(CONFIG), chat_template=TEMPLATE)


def bench(model: Checkpoint, ref: Checkpoint | None = None) -> MadeUpBench:
    pair = (model, ref or clean())
    opened = tuple(
        Opened(SimpleNamespace(kind="checkpoint", recorded=None, tokens=None, path=Path("x"), text="x"), file)  # type: ignore[arg-type]
        for file in pair
    )
    found = MadeUpBench(files_by_side=dict(zip(("model", "ref"), pair, strict=True)))

    class Lazy:
        @property
        def tokens(self) -> object:
            return found.once("tokens", lambda: compare_tokens(opened, engine=False))  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> object:
            return getattr(found, name)

    return Lazy()  # type: ignore[return-value]


def renamed(token: str, name: str) -> Checkpoint:
    tokens = tuple(name if one == token else one for one in VOCABULARY.tokens)
    return replace(clean(), vocabulary=replace(VOCABULARY, tokens=tokens))


def test_tokenizers() -> None:
    every = (*TOKENIZERS, "NOTE-CHAT-BOS-FALSE-POSITIVE")
    assert set(statuses(bench(clean()), *every).values()) == {"pass"}
    # The gate's ids are those of Qwen2's vocabulary, which a tiny one is not.
    assert outcome(bench(clean()), "APRJAX-TOKENIZER-001").status is Status.UNMEASURED
    # A control token that has become ordinary text.
    assert outcome(bench(renamed("<|im_start|>", "<|im_begin|>")), "APRJAX-TOKENIZER-004").status is Status.FAIL
    # Two tokens exchanged: other ids for the same text.
    tokens = list(VOCABULARY.tokens)
    a, b = tokens.index("e"), tokens.index("t")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    swapped = replace(clean(), vocabulary=replace(VOCABULARY, tokens=tuple(tokens)))
    assert outcome(bench(swapped), "APRJAX-TOKENIZER-002").status is Status.FAIL
    # No end of text: generation would never stop.
    endless = replace(clean(), vocabulary=replace(VOCABULARY, eos_token_id=0))
    found = outcome(bench(endless), "APRJAX-TOKENIZER-005")
    assert found.status is Status.FAIL
    assert "model" in found.reason


def test_a_file_without_a_tokenizer_fails() -> None:
    without = replace(clean(), vocabulary=None)
    for test_id in (*TOKENIZERS, "APRJAX-TOKENIZER-001"):
        found = outcome(bench(without), test_id)
        assert found.status is Status.FAIL
        assert "no usable tokenizer" in found.reason


@pytest.mark.thorough
def test_templates() -> None:
    assert set(statuses(bench(clean()), *TEMPLATES, "FALSIFY-CHAT-763").values()) == {"pass"}
    # One newline less behind a turn.
    shorter = replace(
        clean(), chat_template=TEMPLATE.replace("<|im_end|>\\n' }}{%- endfor", "<|im_end|>' }}{%- endfor")
    )
    found = statuses(bench(shorter), *TEMPLATES)
    assert found["FALSIFY-CHAT-001"] == found["GATE-CHAT-SHIP-008"] == "fail"
    assert "byte" in outcome(bench(shorter), "GATE-CHAT-SHIP-008").reason
    # A template that cannot be parsed, and one that drops messages.
    broken = replace(clean(), chat_template="{% for message in messages %}")
    assert set(statuses(bench(broken), *TEMPLATES[:1], *TEMPLATES[2:]).values()) == {"fail"}
    last = replace(clean(), chat_template="{{ '<|im_start|>system\\n' + messages[0].content }}")
    assert outcome(bench(last), "FALSIFY-CHAT-762").measured["lost_messages"] == 1
    assert outcome(bench(last), "FALSIFY-CHAT-762").status is Status.FAIL


@pytest.mark.parametrize("test_id", ["FALSIFY-CHAT-001", "FALSIFY-CHAT-762", "GATE-CHAT-SHIP-008"])
def test_two_base_models_have_nothing_to_render(test_id: str) -> None:
    base = tiny_checkpoint(CONFIG)
    assert outcome(bench(base, base), test_id).status is Status.UNMEASURED
    # One of the two is no base model: then the other has lost its template.
    assert outcome(bench(base, clean()), test_id).status is Status.FAIL
