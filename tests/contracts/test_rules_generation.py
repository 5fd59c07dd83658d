"""Golden answers, sensitivity and valid Python, on answers that are made up."""

from __future__ import annotations

from contract_sides import MadeUpBench, outcome, statuses
from tiny import CONFIG, tiny_checkpoint

from aprjax.contracts.check.answers import Answer, questions
from aprjax.contracts.types import Status

GOLDEN = ("APRJAX-GOLDEN-001", "APRJAX-GOLDEN-002", "APRJAX-GOLDEN-003")
SENSITIVITY = tuple(f"FALSIFY-GGUF-PROMPT-SENS-00{number}" for number in (1, 2, 3))
SOUND = {
    ("two-plus-two", "once"): "2 + 2 equals 4.",
    ("hello", "once"): "Hello! How can I help?",
    ("hello-there", "once"): "I am well, thank you.",
    ("france", "once"): "The capital of France is Paris.",
    ("the-answer-is", "none"): "4. 2+2 equals 4.",
    ("my-name-is", "none"): " Ada and I write programs.",
    ("fibonacci", "none"): "\n    return n if n < 2 else fibonacci(n - 1)",
    ("fib", "none"): "\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
}


def answers(ended: bool = True, **changes: str) -> dict[tuple[str, str], Answer]:
    made = {}
    for question in questions():
        text = changes.get(question.prompt.name.replace("-", "_"), SOUND[question.key])
        made[question.key] = Answer(question, tuple(text.encode()), text, ended)
    return made


def bench(model: dict, ref: dict | None = None) -> MadeUpBench:
    given = {"model": model, "ref": answers() if ref is None else ref}
    file = tiny_checkpoint(CONFIG)
    return MadeUpBench(
        answers=lambda side: given[side], same_computation=False, files_by_side={"model": file, "ref": file}
    )


def test_every_question_has_an_answer() -> None:
    assert {question.key for question in questions()} == set(SOUND)


def test_golden_answers() -> None:
    assert set(statuses(bench(answers()), *GOLDEN).values()) == {"pass"}
    # The story's "\ns\ns": three copies in a row of a fragment.
    degenerate = bench(answers(two_plus_two="\ns" * 12))
    found = outcome(degenerate, "APRJAX-GOLDEN-001")
    assert found.status is Status.FAIL
    assert "three times in a row" in found.reason
    assert outcome(bench(answers(france="The capital of France is Rome.")), "APRJAX-GOLDEN-001").status is Status.FAIL
    assert outcome(bench(answers(ended=False)), "APRJAX-GOLDEN-002").status is Status.FAIL
    other = outcome(bench(answers(hello="Hi!")), "APRJAX-GOLDEN-003")
    assert other.status is Status.FAIL
    assert "hello parts at token 1" in other.reason


def test_sensitivity() -> None:
    assert set(statuses(bench(answers()), *SENSITIVITY).values()) == {"pass"}
    deaf = answers(the_answer_is="the same", my_name_is="the same", fibonacci="the same")
    assert statuses(bench(answers(), deaf), *SENSITIVITY) == dict(
        zip(SENSITIVITY, ("fail", "fail", "pass"), strict=True)
    )
    assert statuses(bench(deaf), *SENSITIVITY) == dict(zip(SENSITIVITY, ("pass", "pass", "fail"), strict=True))
    # Different is not enough: upstream's rule is satisfied by two different broken texts.
    broken = bench(answers(), answers(the_answer_is="ampiezza = 0.5 " * 9, my_name_is="\ns" * 20))
    assert outcome(broken, SENSITIVITY[0]).status is Status.FAIL


def test_indented_python_is_refused_by_the_gate_and_not_degenerate() -> None:
    # The 1.5B's own answer to `def fibonacci(n):`, in part: twelve spaces are four bytes three times in a row.
    nested = "\n    else:\n        a, b = 0, 1\n        for _ in range(3, n + 1):\n            a, b = b, a + b\n"
    found = outcome(bench(answers(), answers(fibonacci=nested)), SENSITIVITY[0])
    assert found.status is Status.PASS
    assert (found.measured["degenerate"], found.measured["refused_by_the_gate"]) == (0, 1)
    assert "refuses the answer to 'fibonacci'" in found.reason
    assert "white space" in found.reason
    # White space without end is a loop, whatever the gate's rule is worth.
    endless = outcome(bench(answers(), answers(fibonacci="\n    if n:" + " " * 200)), SENSITIVITY[0])
    assert endless.status is Status.FAIL


def test_valid_python() -> None:
    name = "FALSIFY-QW2E-SHIP-002"
    assert outcome(bench(answers()), name).status is Status.PASS
    assert outcome(bench(answers(fib="\n    return fib(n - 1) +\n")), name).status is Status.FAIL
    assert outcome(bench(answers(fib="\n" + "    s\n" * 20)), name).status is Status.FAIL
    # Cut off in the middle of an expression: nothing is known of the program that would have come.
    cut = outcome(bench(answers(ended=False, fib="\n    return fib(n - 1) + fib(")), name)
    assert cut.status is Status.UNMEASURED
    assert "budget" in cut.reason
    found = bench(answers())
    outcome(found, name)
    assert found.artifacts["ast-parse-result.json"]["function_names"] == ["fib"]
