"""What mkdocs asks of us while it builds: a command's options come from the command itself, so they cannot go stale."""

from __future__ import annotations

import re
from typing import Any

import typer

from aprjax.cli import app

_PLACE = re.compile(r"<!-- options: ([\w-]+) -->")


def options_table(name: str) -> str:
    """The arguments and options of a command as a Markdown table.

    Raises:
        KeyError: there is no such command.
    """
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined] - typer types it as any command
    rows = ["| option | what it does |", "|---|---|"]
    for parameter in command.params:
        names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or (parameter.name or '').upper()}`"
        elif parameter.metavar:
            names += f" `{parameter.metavar}`"
        text = (getattr(parameter, "help", None) or "").replace("|", r"\|")
        default = parameter.default
        if parameter.required:
            text += " Required."
        elif default not in (None, False, True, ()) and not callable(default):
            text += f" Default: `{getattr(default, 'value', default)}`."
        choices = getattr(parameter.type, "choices", None)
        if choices:
            spelled = ", ".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
            text += f" One of {spelled}."
        rows.append(f"| {names} | {text} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables into the pages."""
    return _PLACE.sub(lambda match: options_table(match[1]), markdown)
