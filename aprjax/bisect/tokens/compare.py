"""`bisect tokens`: are both sides fed the same, and is what they are fed what the prompt meant?

Weights play no part: this is about text, ids, special tokens and templates, and it is answered in seconds.
A difference is traced to a cause (`Cause`), and a cause is named once: that other ids stop generation is not
a second fault where a special token has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aprjax.bisect.open_sides import Opened
from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.bisect.tokens.prompt import compare_prompt, prompt_findings, shortened
from aprjax.bisect.tokens.report import Cause, FedSide, PromptTokens, TokensComparison
from aprjax.bisect.tokens.sides import TokenSide
from aprjax.bisect.tokens.template import template_report
from aprjax.bisect.tokens.vocabulary import vocabulary_findings
from aprjax.checkpoint.types import CheckpointError
from aprjax.text import PROBES, wrap
from aprjax.text.wrapping import user_text
from aprjax.trace.engine import EngineError
from aprjax.trace.llama_cpp_text import LlamaText, ask_llama_cpp

# What a finding of severity error accuses, worst first: a reader starts with the first.
_CAUSES: dict[str, Cause] = {
    "tokenizer-missing": Cause.TOKENIZER_MISSING,
    "prompt-wrapped-twice": Cause.DOUBLE_WRAP,
    "special-id-wrong": Cause.SPECIAL_IDS,
    "special-id-differs": Cause.SPECIAL_IDS,
    "eos-id-wrong": Cause.SPECIAL_IDS,
    "eos-id-differs": Cause.SPECIAL_IDS,
    "eos-missing": Cause.STOP_TOKENS,
    "stop-ids-differ": Cause.STOP_TOKENS,
    "double-bos": Cause.BOS,
    "bos-id-differs": Cause.BOS,
    "add-bos-differs": Cause.BOS,
    "special-token-as-text": Cause.SPECIAL_AS_TEXT,
    "special-token-missing": Cause.SPECIAL_AS_TEXT,
    "special-token-absent": Cause.SPECIAL_AS_TEXT,
    "vocabulary-differs": Cause.VOCABULARY,
    "vocabulary-too-large": Cause.VOCABULARY,
    "merges-differ": Cause.VOCABULARY,
    "padding-id-fed": Cause.PADDING,
    "template-error": Cause.TEMPLATE,
    "templates-differ": Cause.TEMPLATE,
    "llama-cpp-differs": Cause.TOKENIZER,
    "tokens-differ": Cause.TOKENS,
}


@dataclass(frozen=True)
class Asked:
    """A prompt as text, before wrapping; `given` unless it was decoded from a trace."""

    name: str
    text: str
    wrap: str
    given: bool = True

    def fed(self) -> str:
        """The text that is encoded."""
        return wrap(self.text, self.wrap)


def compare_tokens(
    opened: tuple[Opened, Opened],
    *,
    text: str | None = None,
    times: str = "none",
    ids: Sequence[int] | None = None,
    engine: bool = True,
    ask: Callable[..., LlamaText] = ask_llama_cpp,
) -> TokensComparison:
    """Compares what two sides are fed.

    Args:
        opened: model and reference.
        text: a prompt; without one (and without ids), a recorded trace's own tokens, else the three probes.
        times: how often the prompt is wrapped: none, once or twice.
        ids: token ids instead of a text: both sides are fed these.
        engine: also ask llama.cpp about every GGUF file, if it is installed.
        ask: what asks it.

    Raises:
        CheckpointError: neither side has a tokenizer or a trace; the prompt is empty or cannot be encoded.
        EngineError: llama.cpp is a side, and cannot be asked.
    """
    model, ref = TokenSide.of("model", opened[0]), TokenSide.of("ref", opened[1])
    sides = (model, ref)
    findings = [_missing(side) for side in sides if side.tokenizer is None and side.checkpoint is not None]
    if all(side.tokenizer is None for side in sides) and not any(side.recorded for side in sides):
        problem = next(side.problem for side in sides if side.problem is not None)
        raise CheckpointError(problem.message, file=problem.file, fix=problem.fix)
    difference, found = vocabulary_findings(model, ref)
    findings += found
    asked = _asked(sides, text, times, ids)
    user = user_text(asked[0].text) if asked and asked[0].given else PROBES[0].text
    answers, engine_facts = _ask_engines(sides, asked, user, engine=engine, ask=ask)
    prompts: list[PromptTokens] = []
    for number, (one, fed) in enumerate(_fed(sides, asked, ids, answers)):
        prompt, first = compare_prompt(one.name, one.text if one.given else None, one.wrap, *fed)
        prompts.append(prompt)
        findings += prompt_findings(prompt, model, ref)
        if first is not None:
            message = f"{one.name}: from position {first.position} the ids differ ({first.explanation})"
            findings.append(SidedFinding("tokens-differ", "error", message, side="both"))
        findings += _encoding_findings(prompt, number, answers)
    findings += [
        finding for side in sides if side.name in answers for finding in _engine_findings(side, answers[side.name])
    ]
    rendered = next((answers[name].rendered for name in ("ref", "model") if name in answers), None)
    template, found = template_report(user, model, ref, rendered)
    findings += found
    findings = _said_once(findings)
    return TokensComparison(
        *_verdict(prompts, findings),
        sides={side.name: side.info() for side in sides},
        prompts=tuple(prompts),
        vocabulary=difference,
        template=template,
        engine=engine_facts,
        findings=tuple(findings),
    )


def _said_once(findings: list[SidedFinding]) -> list[SidedFinding]:
    """The findings, those that both sides share marked as such."""
    found: dict[tuple[str, str], SidedFinding] = {}
    for finding in findings:
        key = (finding.id, finding.message)
        known = found.get(key)
        found[key] = finding if known is None or known.side == finding.side else replace(finding, side="both")
    return list(found.values())


def _missing(side: TokenSide) -> SidedFinding:
    assert side.problem is not None
    message = side.problem.message + (f". Likely fix: {side.problem.fix}" if side.problem.fix else "")
    # apr-format.md 6.7, "tokenizer missing".
    reference = "GH-185, GH-156, #2392, #2437, PMAT-154, PMAT-172"
    return SidedFinding("tokenizer-missing", "error", message, reference=reference, side=side.name)


def _asked(
    sides: tuple[TokenSide, TokenSide], text: str | None, times: str, ids: Sequence[int] | None
) -> tuple[Asked, ...]:
    if ids is not None:
        return ()
    if text is not None:
        if not wrap(text, times):
            raise CheckpointError("the prompt has no tokens", fix="give a prompt that is not empty")
        return (Asked("prompt", text, times),)
    recorded = [(side, other) for side, other in (sides, sides[::-1]) if side.recorded is not None]
    if recorded:
        # A trace without a prompt: the other side is asked for the ids of the same text.
        side, other = recorded[0]
        return (Asked("trace", side.fed("trace", side.recorded or (), other).text or "", "none", given=False),)
    return tuple(Asked(p.name, p.text, p.wrap if times == "none" else times) for p in PROBES)


def _fed(
    sides: tuple[TokenSide, TokenSide],
    asked: tuple[Asked, ...],
    ids: Sequence[int] | None,
    answers: dict[str, LlamaText],
) -> list[tuple[Asked, tuple[FedSide, FedSide]]]:
    """Every prompt, and what each side is fed for it."""
    model, ref = sides
    if ids is not None:
        given = tuple(ids)
        fed = (model.fed("given", given, ref), ref.fed("given", given, model))
        return [(Asked("tokens", "", "none", given=False), fed)]
    return [
        (one, (_side(model, ref, one, i, answers), _side(ref, model, one, i, answers))) for i, one in enumerate(asked)
    ]


def _side(side: TokenSide, other: TokenSide, asked: Asked, number: int, answers: dict[str, LlamaText]) -> FedSide:
    if side.recorded is not None:
        return side.fed("trace", side.recorded, other)
    if side.opened.side.kind == "llama.cpp":
        return side.fed("llama.cpp", answers[side.name].ids[number])
    return side.encode(asked.fed())


def _ask_engines(
    sides: tuple[TokenSide, TokenSide],
    asked: tuple[Asked, ...],
    user: str,
    *,
    engine: bool,
    ask: Callable[..., LlamaText],
) -> tuple[dict[str, LlamaText], dict[str, str]]:
    """llama.cpp's answers by side, and per side what it was or why it was not asked."""
    texts = [one.fed() for one in asked]
    answers: dict[str, LlamaText] = {}
    facts: dict[str, str] = {}
    known: dict[tuple[Path, str | None], LlamaText] = {}
    for side in sides:
        checkpoint, is_side = side.checkpoint, side.opened.side.kind == "llama.cpp"
        if not engine and not is_side:
            facts[side.name] = "not asked"
        elif checkpoint is None or checkpoint.format != "gguf" or side.recorded is not None:
            facts[side.name] = "llama.cpp reads GGUF files only"
        elif side.tokenizer is None:
            facts[side.name] = "not asked: the file has no tokenizer"
        else:
            options = side.opened.side.options
            try:
                key = (checkpoint.path, options.library)
                if key not in known:
                    known[key] = ask(checkpoint, texts, user=user, options=options)
                answers[side.name] = known[key]
                facts[side.name] = f"llama-cpp-python {known[key].engine.get('llama_cpp_python', '')}"
            except EngineError as error:
                if is_side:
                    raise
                facts[side.name] = error.message
    return answers, facts


def _encoding_findings(prompt: PromptTokens, number: int, answers: dict[str, LlamaText]) -> list[SidedFinding]:
    """Where llama.cpp makes other ids of a file and a text than aprjax."""
    findings = []
    for name, fed in (("model", prompt.model), ("ref", prompt.ref)):
        if name not in answers or fed.source != "tokenizer":
            continue
        theirs = answers[name].ids[number]
        if theirs != fed.ids:
            at = next((i for i, (a, b) in enumerate(zip(fed.ids, theirs, strict=False)) if a != b), len(theirs))
            message = (
                f"{prompt.name}: llama.cpp makes other ids of the same file, from position {at}: "
                f"{list(theirs[at : at + 4])} against {list(fed.ids[at : at + 4])}"
            )
            findings.append(SidedFinding("llama-cpp-differs", "error", message, side=name))
    return findings


def _engine_findings(side: TokenSide, answer: LlamaText) -> list[SidedFinding]:
    findings = []
    if answer.added:
        message = f"llama.cpp puts {list(answer.added)} first, as the file asks; aprjax feeds the prompt alone"
        findings.append(SidedFinding("llama-cpp-adds-bos", "warning", message, side=side.name))
    if side.tokenizer is not None and set(answer.stop_ids) != side.tokenizer.stop_ids:
        apart = sorted(set(answer.stop_ids) ^ side.tokenizer.stop_ids)
        message = f"llama.cpp and aprjax end generation at other ids: {apart}"
        findings.append(SidedFinding("llama-cpp-stops-differ", "warning", message, side=side.name))
    return findings


def _verdict(prompts: list[PromptTokens], findings: list[SidedFinding]) -> tuple[Verdict, str, tuple[Cause, ...]]:
    errors = [finding for finding in findings if finding.severity == "error"]
    found = {_CAUSES[finding.id] for finding in errors if finding.id in _CAUSES}
    wrapped_twice = next((finding for finding in findings if finding.id == "prompt-wrapped-twice"), None)
    if wrapped_twice is not None:
        found.add(Cause.DOUBLE_WRAP)
    # That the ids differ is the symptom, where a cause is known.
    if len(found) > 1:
        found.discard(Cause.TOKENS)
    causes = tuple(cause for cause in dict.fromkeys(_CAUSES.values()) if cause in found)
    unmeasured = [prompt for prompt in prompts if not prompt.measured]
    if unmeasured:
        missing = next((f for f in errors if f.id == "tokenizer-missing"), None)
        why = "one side has no tokenizer" if missing is None else f"{missing.side}: {missing.message}"
        return Verdict.UNMEASURED, f"nothing to compare for {unmeasured[0].name}: {why}", causes
    if any(finding.id in _CAUSES for finding in errors):
        first = next(f for cause in causes for f in errors if _CAUSES.get(f.id) is cause)
        where = "" if first.side in ("", "both") else f"{first.side}: "
        return Verdict.DIVERGENCE, f"{' and '.join(causes)}: {where}{first.message}", causes
    counts = [len(prompt.ref.ids) for prompt in prompts]
    what = f"the same {counts[0]} ids" if len(counts) == 1 else f"the same ids ({', '.join(map(str, counts))} tokens)"
    names = ", ".join(repr(shortened(p.text, 40)) if p.text and len(prompts) == 1 else p.name for p in prompts)
    asked = "" if wrapped_twice is None else "; the prompt is wrapped twice, as asked"
    return Verdict.AGREE, f"both sides are fed {what} for {names}{asked}", causes
