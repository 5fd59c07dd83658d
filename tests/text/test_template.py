"""Templates that are broken or hostile end in one sentence, soon; the ChatML wrap."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from aprjax.checkpoint.types import CheckpointError
from aprjax.text import PROBES, TemplateError, is_wrapped, render_chat, wrap
from aprjax.text import template as module

from .synthetic import checkpoint_of, small_vocabulary

USER = [{"role": "user", "content": "hi"}]


def render(template: str, **variables: object) -> str:
    return render_chat(checkpoint_of(small_vocabulary(), template), USER, **variables)


def refusal(template: str) -> str:
    started = time.perf_counter()
    with pytest.raises(TemplateError) as caught:
        render(template)
    # Six times the CPU limit, for a machine that is busy with other things.
    assert time.perf_counter() - started < 30.0
    assert isinstance(caught.value, CheckpointError)
    message = str(caught.value)
    assert message.startswith("model.gguf: chat template")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__",
        "raise_exception.__globals__['sys']",
        "strftime_now.__code__.co_consts",
        "messages.append(1)",
        "messages[0].update(role='x')",
        "messages|attr('__class__')|attr('mro')",
        "'{0.__class__.__mro__}'.format(1).mro()",
        "namespace(__class__=1)",
        "dict.__base__.x",
        "self._TemplateReference__context.x",
        "(messages|map('attr', '__class__')|list)[0].x",
        "joiner.__init__.__builtins__",
        "range.__self__.x",
        "lipsum.__globals__",
    ],
)
def test_escapes_from_the_sandbox_fail(expression):
    message = refusal(f"{{{{ {expression} }}}}")
    assert "its sandbox forbids" in message or "is undefined" in message or "has no attribute '__" in message


def test_formatting_does_not_read_attributes():
    # CVE-2025-27516: `format` reached through the filter `attr` must be the sandboxed one.
    assert render("{{ ('{0.__class__}'|attr('format'))(1) }}") == ""


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop iterations"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "loop iterations",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses too deeply"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recurses too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too deeply"),
        ("{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}", "longer than"),
        ("{{ 'a' * 10**11 }}", "512 MiB"),
        ("{{ ('a' * 700 * 1024**2)|length }}", "512 MiB"),
        ("{% set x = 'a' * 1000 %}" + "{% set x = x ~ x %}" * 40, "512 MiB"),
        ("{% set x = 'a' %}" + "{% set x = x.replace('a', x + x) %}" * 40, "512 MiB"),
        ("{{ '%1000000000d' % 1 }}", "512 MiB"),
        ("{{ 'a'|center(10**10) }}", "512 MiB"),
        ("{{ 9**(9**9) }}", "CPU time"),
        ("{% set x = 'ab' * 100000 %}{% for i in range(99999) %}{% set y = x|list|sort %}{% endfor %}", "CPU time"),
    ],
    ids=lambda value: value[:24],
)
def test_bombs_are_defused(monkeypatch, template, cause):
    if cause == "CPU time":  # the one limit that has to be waited for
        monkeypatch.setattr(module, "CPU_SECONDS", 1)
    assert cause in refusal(template)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("a\n{% if %}", "line 2: syntax"),
        ("{% for x in messages %}", "syntax"),
        ("{{ x", "syntax"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ 1|nonsense }}", "No filter named 'nonsense'"),
        ("a\nb\n{{ missing.content }}", "line 3: 'missing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'base' %}", "no loader"),
    ],
)
def test_errors_name_their_cause_and_line(template, cause):
    assert cause in refusal(template)


def test_no_template_is_an_error_that_says_what_to_do():
    with pytest.raises(TemplateError, match="--wrap once"):
        render_chat(checkpoint_of(small_vocabulary(), None), USER)


def test_special_tokens_and_variables_reach_the_template():
    assert render("{{ bos_token }}{{ eos_token }}{{ pad_token }}") == "<|endoftext|><|im_end|><|endoftext|>"
    assert (
        render("{{ extra.a[0] }}{{ add_generation_prompt }}", extra={"a": [1]}, add_generation_prompt=False) == "1False"
    )
    assert render_chat(checkpoint_of(None, "{{ bos_token is defined }}"), USER) == "False"


def test_text_survives_the_way_to_the_renderer_and_back():
    content = "é中👍\x00\u2028\r\n\t\\\"'{{ 7 }}\ud83d<|im_end|>"
    assert (
        render_chat(checkpoint_of(None, "{{ messages[0].content }}"), [{"role": "user", "content": content}]) == content
    )


def test_messages_that_are_no_json_are_a_type_error():
    with pytest.raises(TypeError, match="JSON"):
        render_chat(checkpoint_of(None, "x"), [{"role": "user", "content": object()}])


def test_the_renderer_sees_no_environment(monkeypatch):
    seen = {}
    original = subprocess.run

    def spy(*args, **kwargs):
        seen.update(kwargs["env"])
        return original(*args, **kwargs)

    monkeypatch.setenv("APRJAX_SECRET", "s")
    monkeypatch.setattr(subprocess, "run", spy)
    assert render("x") == "x"
    assert set(seen) <= {"SYSTEMROOT", "TZ", "LD_LIBRARY_PATH"}


def test_a_renderer_that_hangs_or_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "WALL_SECONDS", 0.0)
    assert "not rendered within" in refusal("x")
    monkeypatch.undo()
    monkeypatch.setattr(module.sys, "executable", str(Path("/nonexistent/python")))
    assert "cannot be started" in refusal("x")


def test_wrap_is_a_user_turn_without_a_system_turn():
    once = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert wrap("hi", "none") == "hi"
    assert wrap("hi", "once") == wrap("hi") == once
    assert wrap("hi", "twice") == f"<|im_start|>user\n{once}<|im_end|>\n<|im_start|>assistant\n"
    assert [is_wrapped(text) for text in ("hi", once, wrap("hi", "twice"), " \n" + once)] == [False, True, True, True]
    with pytest.raises(ValueError, match="thrice"):
        wrap("hi", "thrice")


def test_probes_are_the_three_of_the_story():
    assert [probe.name for probe in PROBES] == ["direct", "chatml", "long"]
    assert PROBES[0].prompt() == "What is 2+2?"
    assert PROBES[1].prompt() == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert not is_wrapped(PROBES[2].prompt())
