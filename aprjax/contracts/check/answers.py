"""What a side says to the prompts of the contracts: greedy, all prompts in one batch, once a side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprjax.bisect.chatml.prompts import UPSTREAM_PROMPTS, ChatPrompt
from aprjax.bisect.open_sides import Opened
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.model import Qwen2
from aprjax.text.tokenizer import Tokenizer
from aprjax.trace.llama_cpp_generate import generate_llama_cpp

# Upstream's golden gate allows 512 tokens (contracts.md 5). A sound answer to these prompts takes some ten to sixty,
# so the gate's verdict on sound models needs no more; an answer that does not end here is said to be cut off.
BUDGET = 128


@dataclass(frozen=True)
class Question:
    """A prompt and how often it is wrapped in ChatML."""

    prompt: ChatPrompt
    wrap: str

    @property
    def key(self) -> tuple[str, str]:
        """Name and wrap."""
        return self.prompt.name, self.wrap


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        question: what was asked.
        tokens: the new ones, a stop token included.
        text: of them, special tokens left out.
        ended: whether a stop token ended it, and not the budget.
    """

    question: Question
    tokens: tuple[int, ...]
    text: str
    ended: bool

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "prompt": self.question.prompt.text,
            "name": self.question.prompt.name,
            "wrap": self.question.wrap,
            "tokens": list(self.tokens),
            "text": self.text,
            "ended_by_stop_token": self.ended,
        }


def questions() -> tuple[Question, ...]:
    """The golden cases in ChatML; the prompts of prompt sensitivity and SHIP-002 as they are."""
    golden = [p for p in UPSTREAM_PROMPTS if any(role.startswith("golden_output") for role in p.roles)]
    plain = [p for p in UPSTREAM_PROMPTS if any(r.startswith(("prompt sensitivity", "SHIP-002")) for r in p.roles)]
    return (*(Question(p, "once") for p in golden), *(Question(p, "none") for p in plain))


def ask(opened: Opened, load: Callable[[], Qwen2], *, budget: int = BUDGET) -> dict[tuple[str, str], Answer]:
    """Answers to all questions; `load` gives the model where aprjax runs it.

    Raises:
        CheckpointError: the side cannot generate, or has no tokenizer.
        EngineError: llama.cpp is the side, and failed.
    """
    checkpoint = opened.checkpoint
    if checkpoint is None or opened.side.kind not in ("checkpoint", "llama.cpp"):
        raise CheckpointError(
            f"{opened.side.text} does not generate",
            file=opened.side.path,
            fix="give a checkpoint or llama.cpp:FILE.gguf",
        )
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    asked = questions()
    prompts = [tokenizer.encode(question.prompt.fed(question.wrap)) for question in asked]
    if opened.side.kind == "llama.cpp":
        runs = generate_llama_cpp(checkpoint.path, prompts, max_new_tokens=budget, options=opened.side.options).runs
        found: Sequence[Sequence[int]] = [run.tokens for run in runs]
    else:
        found = generate_batch(load(), prompts, max_new_tokens=budget, stop_ids=tokenizer.stop_ids)
    answers = {}
    for question, tokens in zip(asked, found, strict=True):
        ended = bool(tokens) and tokens[-1] in tokenizer.stop_ids
        known = [token for token in (tokens[:-1] if ended else tokens) if token < len(tokenizer)]
        answers[question.key] = Answer(question, tuple(tokens), tokenizer.decode(known), ended)
    return answers


def answers_json(answers: dict[tuple[str, str], Answer], arithmetic: Arithmetic | None) -> dict[str, Any]:
    """All answers of a side, as plain JSON values."""
    return {
        "schema": "aprjax.answers/1",
        "arithmetic": None if arithmetic is None else arithmetic.name,
        "budget": BUDGET,
        "answers": [answer.to_json() for answer in answers.values()],
    }
