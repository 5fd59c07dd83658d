"""The questions in Python are those of the command line: the same names, the same arguments, the same defaults."""

from __future__ import annotations

import enum
import inspect

import pytest
import typer

import aprjax
from aprjax import cli

QUESTIONS = ("attribute", "explain", "files", "generate", "layers", "locate", "margins", "noise", "replay", "tokens")
# Where to write, files instead of texts, and how a process is set up: a caller in Python does these otherwise.
NOT_ASKED = {"json_out", "report", "save_trace", "save_layers", "save_stages", "prompt_file", "text_file", "context"}
NOT_ASKED |= {"runs", "top", "mesh"}
# Of rarer use; the functions behind the commands take them.
LEFT_OUT = {"margins": {"continuation_tokens"}, "generate": {"step_by_step"}, "tokens": {"token_list"}}


def options(name: str) -> dict[str, object]:
    """A command's parameters with their defaults as plain values."""
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    return {
        p.name: p.default.value if isinstance(p.default, enum.Enum) else p.default
        for p in command.params
        if p.name not in NOT_ASKED | LEFT_OUT.get(name, set())
    }


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_option_is_an_argument(name: str) -> None:
    asked = inspect.signature(getattr(aprjax, name)).parameters
    known = options(name)
    assert set(known) <= set(asked)
    for argument, default in known.items():
        parameter = asked[argument]
        if parameter.default is not inspect.Parameter.empty:
            # typer has no default for an argument that must be given, and None for a list that is empty.
            assert parameter.default == default or default is None, argument


def test_the_other_names_lead_somewhere() -> None:
    checkpoint = aprjax.open(aprjax.embedded_model())
    assert aprjax.preset("float32") == aprjax.Arithmetic("float32")
    assert aprjax.Stage("ffn_gate") is aprjax.Stage.FFN_GATE
    assert checkpoint.config.num_layers == 5
