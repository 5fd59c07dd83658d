"""The command that settles why ChatML goes bad: `chatml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from aprjax.cli_app import command
from aprjax.cli_options import (
    SIDE,
    JsonOut,
    ModelArithmetic,
    Prompt,
    PromptFile,
    RefArithmetic,
    ReportDir,
    Wrap,
    check_prompt,
    valid_arithmetic,
)
from aprjax.console import show

# As `aprjax.bisect.chatml.command` has it, which only the command imports.
_BUDGET = 32


def _listed(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"the {what} {unknown[0]!r} is unknown; known: {', '.join(known)}")
    return names


def _wraps(text: str) -> str:
    _listed(text, tuple(Wrap), "wrap")
    return text


def _arithmetics(text: str) -> str:
    for name in text.split(","):
        valid_arithmetic(name.strip())
    return text


def _pair(what: str, ours: str | None, theirs: str | None, default: str) -> tuple[str, str] | None:
    """Both sides' values of a factor where one was given; the other side's is the default."""
    return None if ours is None and theirs is None else (ours or default, theirs or default)


StopChoice = Literal["on", "declared", "off"]


@command
def chatml(
    *,
    model: Annotated[Path, typer.Option(metavar="FILE", help=f"The {SIDE} to judge.")],
    ref: Annotated[Path, typer.Option(metavar="FILE", help=f"The {SIDE} to judge it by.")],
    prompts: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Which of upstream's prompts to run: two-plus-two,fib,…")
    ] = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    wraps: Annotated[
        str, typer.Option(metavar="LIST", callback=_wraps, help="How often to wrap each prompt in a ChatML user turn.")
    ] = "none,once,twice",
    arithmetics: Annotated[
        str, typer.Option(metavar="LIST", callback=_arithmetics, help="How to compute: names of arithmetics.")
    ] = "float32,llama.cpp,realizar",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every continuation.")] = _BUDGET,
    model_wrap: Annotated[Wrap | None, typer.Option(help="How the model's side wrapped, if not as the other.")] = None,
    ref_wrap: Annotated[Wrap | None, typer.Option(help="How the reference's side wrapped.")] = None,
    model_stop: Annotated[
        StopChoice | None, typer.Option(help="Whether stop tokens ended the model's side, if not as the other.")
    ] = None,
    ref_stop: Annotated[StopChoice | None, typer.Option(help="Whether they ended the reference's side.")] = None,
    model_arithmetic: ModelArithmetic = None,
    ref_arithmetic: RefArithmetic = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where finished runs are kept; by default in the cache.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep finished runs, and go on from them.")] = True,
    noise: Annotated[bool, typer.Option(help="Measure the noise floor where a token flips.")] = True,
    json_out: JsonOut = None,
    report: ReportDir = None,
) -> int:
    """Settle why ChatML goes bad: sides, wraps, stop tokens and arithmetics, each varied alone.

    Without a prompt upstream's own are run: the golden cases, the prompt-sensitivity trio, PRED-61 and def fib(n).
    """
    check_prompt(prompt, prompt_file, None, Wrap.NONE)
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.chatml.command import Asked, AsRun, run_chatml
    from aprjax.bisect.chatml.prompts import UPSTREAM_PROMPTS, chosen_prompts, own_prompt
    from aprjax.bisect.chatml.render import render
    from aprjax.bisect.counted import counted_progress
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import cache_folder
    from aprjax.text.prompt import read_prompt_file

    check_destinations(json_out, report)
    if prompt_file is not None:
        prompt = read_prompt_file(prompt_file)
    names = None if prompts is None else _listed(prompts, tuple(p.name for p in UPSTREAM_PROMPTS), "prompt")
    if prompt is None:
        chosen = chosen_prompts(names)
    else:
        chosen = (own_prompt(prompt), *(() if names is None else chosen_prompts(names)))
    wrapped, listed = _listed(wraps, tuple(Wrap), "wrap"), tuple(name.strip() for name in arithmetics.split(","))
    as_run = AsRun(
        _pair("wrap", model_wrap, ref_wrap, "once"),
        _pair("arithmetic", model_arithmetic, ref_arithmetic, listed[0]),
        cast("tuple[StopChoice, StopChoice] | None", _pair("stop", model_stop, ref_stop, "on")),
    )
    asked = Asked(chosen, wrapped, tuple(dict.fromkeys(listed)), max_new_tokens, as_run, noise)
    with counted_progress() as bar:
        found = run_chatml(
            open_checkpoint(model),
            open_checkpoint(ref),
            asked,
            state=(state or cache_folder() / "chatml") if keep else None,
            progress=bar,
        )
    document = found.to_json()
    if report is not None:
        from aprjax.bisect.chatml.render_html import write_report

        typer.echo(f"report: {write_report(found, document, report)}", err=True)
    show(lambda console: render(found, console), document, json_out)
    return found.exit_code
