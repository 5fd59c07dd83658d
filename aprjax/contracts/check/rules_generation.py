"""What the sides say: golden answers, sensitivity to the prompt, valid Python (SHIP-002)."""

from __future__ import annotations

import json

from aprjax.bisect.chatml.judged import state_of
from aprjax.contracts.check.answers import BUDGET, Answer
from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.text.degenerate import judge_text
from aprjax.text.python_completion import check_python, extract_python
from aprjax.text.repetition import measure_repetition

# Upstream's test of prompt sensitivity stops after 32 tokens (contracts.md 1.3).
SENSITIVITY_TOKENS = 32
_SIDES = ("model", "ref")


def _golden(answers: dict[tuple[str, str], Answer]) -> list[Answer]:
    return [a for a in answers.values() if any(r.startswith("golden_output") for r in a.question.prompt.roles)]


@measures("APRJAX-GOLDEN-001")
def golden_answers(asked: Asked) -> Measurement:
    """Upstream's golden cases, by upstream's rules for degenerate text and expected words."""
    answers = _golden(asked.bench.answers("model"))
    refused = []
    for answer in answers:
        prompt = answer.question.prompt
        verdict = judge_text(answer.text, expected=prompt.expected)
        if not verdict.passed:
            refused.append(f"{prompt.text!r}: {verdict.detail}")
    unended = [answer for answer in answers if not answer.ended]
    reason = "; ".join(refused[:3]) or f"{len(answers)} cases, of up to {BUDGET} tokens"
    return Measurement(
        {"refused_answers": len(refused), "answers": len(answers), "cut_off": len(unended)},
        reason,
        artifacts=("answers-model.json",),
    )


@measures("APRJAX-GOLDEN-002")
def answers_end(asked: Asked) -> Measurement:
    """Every golden answer ends by itself, with a stop token."""
    answers = _golden(asked.bench.answers("model"))
    unended = [answer.question.prompt.text for answer in answers if not answer.ended]
    reason = f"first {unended[0]!r}" if unended else f"{len(answers)} answers within {BUDGET} tokens"
    return Measurement({"without_end": len(unended)}, reason, artifacts=("answers-model.json",))


@measures("APRJAX-GOLDEN-003")
def same_answers(asked: Asked) -> Measurement:
    """Both sides say the same, token by token, to every prompt."""
    model, ref = (asked.bench.answers(side) for side in _SIDES)
    differing = [key for key in model if model[key].tokens != ref[key].tokens]
    first = ""
    if differing:
        ours, theirs = model[differing[0]].tokens, ref[differing[0]].tokens
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        first = f"; {differing[0][0]} parts at token {at}: `generate` says whether noise explains it"
    shared = " (the same bytes under one arithmetic: one computation)" if asked.bench.same_computation else ""
    return Measurement(
        {"differing_answers": len(differing), "answers": len(model)},
        f"{len(model)} prompts{shared}{first}",
        artifacts=tuple(f"answers-{side}.json" for side in _SIDES),
    )


def _beginnings(asked: Asked, side: str) -> dict[str, str]:
    """The texts that a side gives to P1, P2 and P3, as far as upstream looks."""
    chosen = {}
    for answer in asked.bench.answers(side).values():
        role = next((r for r in answer.question.prompt.roles if r.startswith("prompt sensitivity")), None)
        if role is not None and answer.question.wrap == "none":
            chosen[role.rpartition(" ")[2]] = json.dumps(answer.tokens[:SENSITIVITY_TOKENS])
    return chosen


def _is_degenerate(answer: Answer) -> bool:
    """Whether the gate refuses it, or it loops.

    Not where the gate's rule is one with known false positives that the text looks like: twelve spaces are three times
    the same four bytes, so that upstream's gate refuses Python that is indented three levels deep.
    """
    return state_of(judge_text(answer.text), measure_repetition(answer.tokens)) in ("degenerate", "loops")


def _sensitivity(asked: Asked, side: str) -> Measurement:
    texts = _beginnings(asked, side)
    chosen = [
        answer
        for answer in asked.bench.answers(side).values()
        if any(role.startswith("prompt sensitivity") for role in answer.question.prompt.roles)
        and answer.question.wrap == "none"
    ]
    degenerate = [answer for answer in chosen if _is_degenerate(answer)]
    refused = [answer for answer in chosen if not judge_text(answer.text).passed]
    told = [f"{SENSITIVITY_TOKENS} tokens of {len(texts)} prompts, {asked.bench.side(side).side.kind}"]
    for answer in refused:
        verdict, name = judge_text(answer.text), answer.question.prompt.name
        why = f", but {verdict.false_positive_risk}" if answer not in degenerate else ""
        told.append(f"upstream's gate refuses the answer to {name!r}: {verdict.detail}{why}")
    return Measurement(
        {
            "distinct": len(set(texts.values())),
            "p1_differs_from_p2": texts["P1"] != texts["P2"],
            "degenerate": len(degenerate),
            "refused_by_the_gate": len(refused),
            "prompts": len(texts),
        },
        "; ".join(told),
        artifacts=(f"answers-{side}.json",),
    )


@measures("FALSIFY-GGUF-PROMPT-SENS-001", "FALSIFY-GGUF-PROMPT-SENS-002")
def reference_listens(asked: Asked) -> Measurement:
    """The GGUF side says other things to other prompts, and nothing degenerate."""
    file = asked.bench.side("ref").checkpoint
    if file is None or file.format != "gguf":
        return Measurement(unmeasured="the reference is no GGUF file")
    return _sensitivity(asked, "ref")


@measures("FALSIFY-GGUF-PROMPT-SENS-003")
def model_listens(asked: Asked) -> Measurement:
    """The control: the model says other things to other prompts, too."""
    return _sensitivity(asked, "model")


@measures("FALSIFY-QW2E-SHIP-002")
def valid_python(asked: Asked) -> Measurement:
    """`def fib(n):` is continued to Python that parses and defines the function."""
    answer = asked.bench.answers("model")["fib", "none"]
    prompt = answer.question.prompt.text
    extracted = extract_python(prompt, answer.text)
    result = check_python(extracted.code)
    asked.bench.keep("fib-completion.py", extracted.code)
    asked.bench.keep("ast-parse-result.json", result.to_json())
    artifacts = ("answers-model.json", "fib-completion.py", "ast-parse-result.json")
    degenerate = _is_degenerate(answer)
    if not result.parses and not answer.ended and not degenerate:
        text = f"the budget of {BUDGET} tokens ended the answer before its Python was complete: {result.error}"
        return Measurement(unmeasured=text, artifacts=artifacts)
    return Measurement(
        {
            "syntax_errors": int(not result.parses),
            "functions": len(result.function_names),
            "ast_nodes": result.ast_node_count,
            "degenerate": degenerate,
        },
        result.error or f"{extracted.rule.value}: {', '.join(result.function_names) or 'no function'}",
        artifacts=artifacts,
    )
