"""The same user's turn through both files' chat templates, through `--wrap once`, and through llama.cpp's own."""

from __future__ import annotations

from difflib import unified_diff

from aprjax.bisect.report import SidedFinding
from aprjax.bisect.tokens.report import TemplateReport
from aprjax.bisect.tokens.sides import TokenSide
from aprjax.text import TemplateError, render_chat, wrap


def template_report(
    user: str, model: TokenSide, ref: TokenSide, llama_cpp: str | None
) -> tuple[TemplateReport | None, list[SidedFinding]]:
    """Both renderings of one user's turn, and the findings on them; None where no side's file is at hand.

    Args:
        user: the turn's text, not wrapped.
        model: the side to judge.
        ref: the side to judge it by.
        llama_cpp: the built-in rendering of the reference's file, or the model's; None unmeasured.
    """
    if model.checkpoint is None and ref.checkpoint is None:
        return None, []
    findings: list[SidedFinding] = []
    texts: dict[str, str | None] = {}
    rendered: dict[tuple[str, tuple[object, ...]], str] = {}
    for side in (model, ref):
        texts[side.name] = None
        checkpoint = side.checkpoint
        if checkpoint is None:
            continue
        if not checkpoint.chat_template:
            message = "the file holds no chat template: what a chat looks like is left to the engine"
            findings.append(SidedFinding("template-missing", "warning", message, side=side.name))
            continue
        vocabulary = checkpoint.vocabulary
        ids = () if vocabulary is None else (vocabulary.bos_token_id, vocabulary.eos_token_id)
        key = (checkpoint.chat_template, ids)
        try:
            if key not in rendered:
                rendered[key] = render_chat(checkpoint, [{"role": "user", "content": user}])
            texts[side.name] = rendered[key]
        except TemplateError as error:
            findings.append(SidedFinding("template-error", "error", error.message, side=side.name))
    ours, theirs, wrapped = texts["model"], texts["ref"], wrap(user, "once")
    diff = "" if ours is None or theirs is None else _diff(theirs, ours, "ref", "model")
    own = ours if theirs is None else theirs
    wrap_diff = "" if own is None else _diff(wrapped, own, "--wrap once", "template")
    findings += _between(model, ref, ours, theirs)
    if own is not None:
        findings += _against_wrap(own, wrapped, ref if theirs is not None else model)
    if llama_cpp is not None and llama_cpp != wrapped:
        message = "llama.cpp's built-in rendering of the template is not what --wrap once makes"
        findings.append(SidedFinding("template-llama-cpp", "warning", message, side="both"))
    return TemplateReport(user, ours, theirs, wrapped, llama_cpp, diff, wrap_diff), findings


def _between(model: TokenSide, ref: TokenSide, ours: str | None, theirs: str | None) -> list[SidedFinding]:
    if ours is None or theirs is None:
        return []
    if ours != theirs:
        message = "the two files' chat templates render the same turn differently (see the diff)"
        return [SidedFinding("templates-differ", "error", message, side="both")]
    templates = {side.checkpoint.chat_template for side in (model, ref) if side.checkpoint is not None}
    if len(templates) > 1:
        message = "the chat templates are other texts, but render this turn alike"
        return [SidedFinding("template-texts-differ", "info", message, side="both")]
    return []


def _against_wrap(own: str, wrapped: str, side: TokenSide) -> list[SidedFinding]:
    if own == wrapped:
        return []
    if not own.endswith(wrapped):
        message = "the chat template's turn is not the one that --wrap once makes (see the diff)"
        return [SidedFinding("template-not-wrap", "warning", message, side=side.name)]
    extra = own[: -len(wrapped)]
    count = "" if side.tokenizer is None else f", {len(side.tokenizer.encode(extra))} tokens"
    message = f"the chat template begins with {extra!r}{count}, which --wrap once (as upstream's gates) leaves out"
    return [SidedFinding("template-system-turn", "info", message, side="both")]


def _diff(before: str, after: str, name: str, other: str) -> str:
    """Unified diff by lines; a line end that only one text has is marked, as `diff` does."""
    if before == after:
        return ""
    lines = [
        line if line.endswith("\n") else line + "\n\\ no line end\n"
        for line in unified_diff(_lines(before), _lines(after), name, other)
    ]
    return "".join(lines)


def _lines(text: str) -> list[str]:
    return [line + "\n" for line in text.split("\n")[:-1]] + ([last] if (last := text.rpartition("\n")[2]) else [])
