"""The options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aprjax.qwen2.arithmetic import PRESETS

SIDE = "checkpoint (.gguf, .apr, safetensors folder)"
ENGINE = "a saved trace, an APRT folder, llama.cpp:FILE.gguf or hf:DIR"


class Wrap(StrEnum):
    """How often a prompt is wrapped in a ChatML user turn."""

    NONE = "none"
    ONCE = "once"
    TWICE = "twice"


def valid_arithmetic(name: str | None) -> str | None:
    """The name, if it is a preset's.

    Raises:
        typer.BadParameter: it is none.
    """
    if name is not None:
        from aprjax.qwen2.arithmetic import UnknownArithmetic, preset

        try:
            preset(name)
        except UnknownArithmetic as error:
            raise typer.BadParameter(str(error)) from None
    return name


def valid_positions(text: str) -> str:
    """`last`, `all` or `A..B`, as it is.

    Raises:
        typer.BadParameter: it is something else.
    """
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if text not in ("last", "all") and (bounds is None or int(bounds[1]) > int(bounds[2])):
        raise typer.BadParameter(f"expected last, all or A..B with A <= B (from 0, both counted), found {text!r}")
    return text


def token_ids(text: str | None) -> list[int] | None:
    """The ids of a list with commas.

    Raises:
        typer.BadParameter: the text is no such list.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise typer.BadParameter(f"expected token ids with commas between them (3838,374,220), found {text!r}")
    return [int(part) for part in text.split(",")]


def check_prompt(prompt: str | None, prompt_file: Path | None, tokens: str | None, wrap: Wrap) -> None:
    """Refuses a prompt given twice, and token ids that are to be wrapped.

    Raises:
        typer.BadParameter: so it is.
    """
    if sum(given is not None for given in (prompt, prompt_file, tokens)) > 1:
        raise typer.BadParameter("give at most one of --prompt, --prompt-file, --tokens")
    if tokens is not None and wrap is not Wrap.NONE:
        raise typer.BadParameter("--wrap goes with text: token ids are taken as they are")


def check_arithmetic(both: str | None, model: str | None, ref: str | None) -> None:
    """Refuses an arithmetic for both sides beside one for either.

    Raises:
        typer.BadParameter: so it is.
    """
    if both is not None and (model is not None or ref is not None):
        raise typer.BadParameter("give --arithmetic, or --model-arithmetic and --ref-arithmetic")


def arithmetic_option(whose: str) -> typer.models.OptionInfo:
    """An option that names a preset."""
    return typer.Option(metavar="NAME", callback=valid_arithmetic, help=f"How {whose} computes: {', '.join(PRESETS)}.")


Model = Annotated[str, typer.Option(metavar="SIDE", help=f"The side to judge: a {SIDE}, {ENGINE}.")]
Ref = Annotated[str, typer.Option(metavar="SIDE", help=f"The side to judge it by: a {SIDE}, {ENGINE}.")]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to run on.")]
PromptFile = Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a UTF-8 file.")]
TokenIds = Annotated[str | None, typer.Option("--tokens", metavar="IDS", help="The same, as token ids: 3838,374,220.")]
WrapOption = Annotated[Wrap, typer.Option(help="Wrap the prompt in a ChatML user turn.")]
BothArithmetic = Annotated[str | None, arithmetic_option("each side")]
ModelArithmetic = Annotated[str | None, arithmetic_option("the model's side")]
RefArithmetic = Annotated[str | None, arithmetic_option("the reference's side")]
Positions = Annotated[
    str, typer.Option(metavar="last|all|A..B", callback=valid_positions, help="Token positions to compare.")
]
JsonOut = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON; - is stdout.")]
ReportDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write a page (index.html), the JSON and plots here.")
]
SaveTrace = Annotated[Path | None, typer.Option(metavar="FILE", help="Save what was captured.")]
