"""What mkdocs asks of us while it builds: a command's options come from the command itself, so they cannot go stale."""

from __future__ import annotations

import re
import types
import typing
from enum import Enum
from typing import Any

import typer

from aprjax.cli import app
from aprjax.cli_options import ENGINE, SIDE
from aprjax.qwen2.arithmetic import PRESETS

_PLACE = re.compile(r"<!-- options: ([\w-]+) -->")
# What recurs in every table is said once, on a page of its own.
_SAID_ELSEWHERE = {
    ": " + ", ".join(PRESETS): ", a [preset](../arithmetic.md)",
    f"a {SIDE}, {ENGINE}": "a [side](index.md#sides)",
    f"{ENGINE}, or a {SIDE}": "a [side](index.md#sides)",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables into the pages."""
    return _PLACE.sub(lambda match: options_table(match[1]), markdown)


def options_table(name: str) -> str:
    """The arguments and options of a command as a Markdown table, for a page in `docs/commands`.

    Raises:
        KeyError: there is no such command.
    """
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined] - typer types it as any command
    types_of = typing.get_type_hints(command.callback)
    rows = ["| option | what it does |", "|---|---|"]
    for parameter in command.params:
        rows.append(f"| {_names(parameter)} | {_text(parameter, types_of.get(parameter.name))} |")
    return "\n".join(rows)


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    return f"{names} `{parameter.metavar}`" if parameter.metavar else names


def _text(parameter: Any, annotation: Any) -> str:
    text = parameter.help or ""
    for said, link in _SAID_ELSEWHERE.items():
        text = text.replace(said, link)
    text = text.replace("|", r"\|")
    choices = _choices(annotation)
    if choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = getattr(parameter.default, "value", parameter.default)
    if parameter.required:
        text += " Required."
    elif parameter.secondary_opts:
        text += f" Default: `{parameter.opts[0] if default else parameter.secondary_opts[0]}`."
    elif default is not None and default is not False and default != ():
        text += f" Default: `{default}`."
    return text


def _choices(annotation: Any) -> list[str]:
    """The values that an enumeration or a literal allows, also where None stands beside it."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []
