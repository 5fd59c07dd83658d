"""Made-up factorials: a function says what every run yields, token ids are characters, `$` ends an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from string import ascii_letters
from typing import get_args

from aprjax.bisect.chatml.causes import Causes, find_causes
from aprjax.bisect.chatml.cells import Continuation, Factorial, FirstLogits, PairFacts, RunKey, Side, SideFacts
from aprjax.bisect.chatml.claims import Claim, judge_claims
from aprjax.bisect.chatml.judged import Cell, CellKey, judge_cells
from aprjax.bisect.chatml.partings import pairings
from aprjax.bisect.chatml.prompts import ChatPrompt

STOP = ord("$")
PROMPTS = {
    "sum": ChatPrompt("sum", "What is 2+2?", ("4",)),
    "name": ChatPrompt("name", "Hello, my name is"),
}
WRAPS = ("none", "once", "twice")
ARITHMETICS = ("float32", "llama.cpp", "realizar")
BUDGET = 40
SOUND = "The answer is 4.$ Ask me anything else!"
DEGENERATE = "\ns" * 20
SIDES: dict[Side, SideFacts] = {
    side: SideFacts(f"{side}.apr", "0" * 64, "apr", declared_stops=frozenset((STOP,)), named_stops=frozenset((STOP,)))
    for side in get_args(Side)
}
SAME = PairFacts(identical_weights=True, files_sentence="The files are the same.")


def run(text: str, *, margin: float = 5.0, runner_up: str = "?") -> Continuation:
    """A run that yields this text, filled up to the budget with letters that do not repeat."""
    tokens = tuple(map(ord, (text + ascii_letters)[:BUDGET]))
    count = len(tokens)
    return Continuation((1, 2), tokens, (margin,) * count, (ord(runner_up),) * count, "a processor")


def factorial(
    yields: Callable[[RunKey], str],
    *,
    facts: PairFacts = SAME,
    declared_by_model: frozenset[int] = frozenset((STOP,)),
    noise: dict[tuple[str, str], float] | None = None,
    arithmetics: tuple[str, ...] = ARITHMETICS,
    wraps: tuple[str, ...] = WRAPS,
    cosine: float = 0.9999,
) -> Factorial:
    """The whole table. Without an own entry the model's ids are the reference's."""
    keys = [RunKey(s, p, w, a) for s, p, w, a in product(("model", "ref"), PROMPTS, wraps, arithmetics)]
    keys += [
        replace(key, ids_of="model")
        for key in keys
        if key.side == "model" and (key.prompt, key.wrap) in facts.ids_differ
    ]
    runs = {key: run(yields(key)) for key in keys}
    pairs = [
        FirstLogits(replace(key, arithmetic=other), key, cosine, True, 0.01, 1e-6)
        for key in keys
        for other in arithmetics[1:]
        if key.side == "ref" and key.arithmetic == arithmetics[0]
    ]
    return Factorial(
        prompts=PROMPTS,
        wraps=wraps,
        arithmetics=arithmetics,
        max_new_tokens=BUDGET,
        runs=runs,
        sides={**SIDES, "model": replace(SIDES["model"], declared_stops=declared_by_model)},
        facts=facts,
        first_logits=tuple(pairs),
        noise=noise or {},
        backend="a processor",
    )


def text_of(tokens: object) -> str:
    """The text of made-up ids."""
    return "".join(map(chr, tokens))  # pyright: ignore[reportArgumentType]


def cells_of(table: Factorial) -> dict[CellKey, Cell]:
    """Every cell, judged."""
    return judge_cells(table, {"model": text_of, "ref": text_of})


def settle(table: Factorial, **as_run: tuple[str, str]) -> tuple[Causes, dict[str, Claim]]:
    """Causes and claims of a table, as the command would find them."""
    causes = find_causes(table, pairings(table, **as_run))  # pyright: ignore[reportArgumentType]
    return causes, {claim.id: claim for claim in judge_claims(table, cells_of(table), causes)}


def supported(claims: dict[str, Claim]) -> set[str]:
    """The slugs of the claims that are supported."""
    return {slug for slug, claim in claims.items() if claim.verdict == "supported"}
