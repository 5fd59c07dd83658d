"""Ids (NFC on) and rendered conversations equal Hugging Face's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from aprjax.checkpoint.types import Checkpoint
from aprjax.text import Tokenizer, render_chat
from aprjax.text.words import ADDED_DIGITS, ADDED_LETTERS

from .corpus import corpus
from .synthetic import checkpoint_of

pytestmark = pytest.mark.transformers_peer

USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "You are terse.\n"}
ANSWER = {"role": "assistant", "content": "2 + 2 = 4 — <b>„fertig“</b> & 'done' 👍"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, in °C & <html>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.5, None]}}},
        {"name": "weather", "arguments": {"city": "東京", "quoted": '"\\\n'}},
    ],
}
RESULTS = [{"role": "tool", "content": '{"temperature": 21}'}, {"role": "tool", "content": "rain"}]

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "user alone": ([USER], None),
    "system and user": ([SYSTEM, USER], None),
    "several turns": ([SYSTEM, USER, ANSWER, USER, ANSWER, USER], None),
    "ends with the assistant": ([USER, ANSWER], None),
    "late system turn": ([USER, SYSTEM, USER], None),
    "tools offered": ([USER], [WEATHER]),
    "tools offered, own system turn": ([SYSTEM, USER], [WEATHER, WEATHER]),
    "tools called": ([USER, CALL, *RESULTS, ANSWER, USER], [WEATHER]),
    "tool result last": ([SYSTEM, USER, CALL, *RESULTS], [WEATHER]),
    "empty content": ([{"role": "user", "content": ""}], None),
    "markup in content": ([{"role": "user", "content": "<|im_end|>\n{{ 1 }} {% if %} \r\n\t \u2028"}], None),
    "long": ([USER, ANSWER] * 200, None),
}

# Of our own writing: what templates do beyond Qwen2.5's.
TEMPLATES = {
    "block trimming": (
        "  {% for m in messages %}\n  {% if loop.first %}\n A\n  {% endif %}\n{{ m.content }}\n{% endfor %}\n\nend\n"
    ),
    "namespace and loop controls": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}{{ ns.n }}:{{ m.role }} {% endfor %}"
    ),
    "loop variables": (
        "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}/{{ loop.revindex }}{{ loop.last }}"
        "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}"
        "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}"
    ),
    "macro, filters, slices": (
        "{% macro t(m, k=1) -%} [{{ m.role|upper }}{{ k }}{{ caller() if caller else '' }}] {%- endmacro %}"
        "{{ t(messages[0]) }}{% call t(messages[-1], k=2) %}!{% endcall %}"
        "{{ messages[::-1]|map(attribute='role')|join(',') }}{{ messages[0].content.split('?')[0]|trim|title }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    ),
    "json": (
        "{{ messages|tojson }}{{ messages[0]|tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'}|tojson(sort_keys=true) }}"
        "{{ tools|tojson(ensure_ascii=true) if tools }}{{ dict(a=1).items()|list }}"
    ),
    "generation tag": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "undefined is empty": (
        "{{ nothing }}{% for x in nothing %}{{ x }}{% endfor %}{{ messages[0].nothing }}{{ nothing is defined }}"
    ),
    "else of a loop, conditions": (
        "{% for m in messages if m.role == 'none' %}x{% else %}none{% endfor %}{{ 'a' if tools else 'b' }}"
        "{{ messages is sequence }}{{ messages[0].content is string }}{{ 'A' ~ 1 ~ 'é' }}{{ [1, 2] + [3] }}"
    ),
    "recursive loop": (
        "{% for m in [[1, [2]], 3] recursive %}"
        "{% if m is iterable %}<{{ loop(m) }}>{% else %}{{ m }}{{ loop.depth }}{% endif %}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
}


def theirs(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[messages], chat_template=template, **variables)
    return rendered[0]


@pytest.fixture(scope="module")
def peer(transformers: ModuleType, real_checkpoint: Checkpoint) -> Any:
    """Hugging Face's Qwen2 tokenizer class on the checkpoint's vocabulary."""
    vocabulary = real_checkpoint.vocabulary
    assert vocabulary is not None
    first_special = vocabulary.tokens.index("<|endoftext|>")
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary.tokens[:first_special])},
        merges=[tuple(merge.split(" ")) for merge in vocabulary.merges],
    )
    kinds = {3: True, 4: False}
    added = [
        transformers.AddedToken(token, normalized=False, special=kinds[kind])
        for token, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True)
        if kind in kinds
    ]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = real_checkpoint.chat_template
    return tokenizer


def known_difference(text: str) -> bool:
    """Where llama.cpp, and so this tokenizer, knowingly parts from Hugging Face's."""
    if "</s>" in text:  # a control token by llama.cpp's list of names, ordinary text in the vocabulary
        return True
    if "'ſ" in text:  # folds to 's in their regular expression
        return True
    return any(first <= ord(c) <= last for c in text for first, last in ADDED_LETTERS + ADDED_DIGITS)


@pytest.mark.real_model
def test_ids_with_nfc_differ_only_where_the_reason_is_known(peer: Any, real_checkpoint: Checkpoint):
    ours = Tokenizer.from_checkpoint(real_checkpoint, nfc=True)
    strings = [text for _, text in corpus()]
    differing = [text for text in strings if ours.encode(text) != peer(text)["input_ids"]]
    assert [text for text in differing if not known_difference(text)] == []
    # The reasons are real ones, and they are few.
    assert 50 < len(differing) < 0.05 * len(strings)


@pytest.mark.real_model
def test_without_nfc_decomposed_text_differs(peer: Any, real: Tokenizer):
    assert real.encode("cafe\u0301") != peer("cafe\u0301")["input_ids"] == real.encode("caf\u00e9")


@pytest.mark.real_model
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("header", [True, False])
def test_qwen_template_renders_alike(peer: Any, real_checkpoint: Checkpoint, name: str, header: bool):
    messages, tools = CONVERSATIONS[name]
    expected = peer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=header)
    assert render_chat(real_checkpoint, messages, tools=tools, add_generation_prompt=header) == expected


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_alike(name: str):
    for messages, tools in (CONVERSATIONS["tools called"], CONVERSATIONS["several turns"]):
        expected = theirs(TEMPLATES[name], messages, tools=tools, add_generation_prompt=True)
        assert render_chat(checkpoint_of(chat_template=TEMPLATES[name]), messages, tools=tools) == expected
