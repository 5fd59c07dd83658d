"""The prompts that the upstream story was told with, each once, and prompts that a user brings.

A prompt is kept without its ChatML; how often it is wrapped is a factor of the factorial. So the golden
cases (ready ChatML) and the raw prompts of the same text share their cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aprjax.checkpoint.types import CheckpointError
from aprjax.text.template import wrap
from aprjax.text.wrapping import unwrap

# How often a prompt is wrapped, in the words of `aprjax.text.template.wrap`.
WRAPS = ("none", "once", "twice")


@dataclass(frozen=True)
class ChatPrompt:
    """One prompt.

    Attributes:
        name: short, for tables and `--prompts`.
        text: without ChatML around it.
        expected: substrings of which the answer to the wrapped prompt must hold one (contracts.md section 5).
        roles: where upstream uses it.
        given: how often the prompt was wrapped as it was given; 0 for raw text.
    """

    name: str
    text: str
    expected: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    given: int = 0

    def fed(self, times: str) -> str:
        """What is encoded."""
        return wrap(self.text, times)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


_GREETING = ("Hello", "Hi", "hey", "hello")

# contracts.md section 4 (PRED-61), section 5 (golden_output, old and new) and
# gguf_prompt_sensitivity.rs (P1 to P3). PRED-61-A is the golden prompt written out as ChatML, which
# `apr run` wrapped once more: its raw text is `two-plus-two`, and what upstream fed is the wrap `twice`.
UPSTREAM_PROMPTS: tuple[ChatPrompt, ...] = (
    ChatPrompt("two-plus-two", "What is 2+2?", ("4",), ("golden_output old 1", "golden_output new 1", "PRED-61-A")),
    ChatPrompt("hello", "Hello", (*_GREETING, "!"), ("golden_output old 2",)),
    ChatPrompt(
        "hello-there",
        "Hello there, how are you doing today my friend?",
        (*_GREETING, "well", "!"),
        ("golden_output new 2",),
    ),
    ChatPrompt("france", "What is the capital of France?", ("Paris",), ("golden_output new 3",)),
    ChatPrompt("the-answer-is", "What is 2+2? The answer is ", (), ("PRED-61-B", "prompt sensitivity P1")),
    ChatPrompt("my-name-is", "Hello, my name is", (), ("PRED-61-A", "prompt sensitivity P2")),
    ChatPrompt("fibonacci", "def fibonacci(n):", (), ("prompt sensitivity P3",)),
    ChatPrompt("fib", "def fib(n):", (), ("SHIP-002",)),
)


def own_prompt(text: str) -> ChatPrompt:
    """A user's prompt; ChatML around it is taken off and counted.

    Raises:
        CheckpointError: nothing is left inside, or it has no UTF-8 form.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"the prompt is not UTF-8: U+{ord(text[error.start]):04X} at character {error.start}",
            fix="give it as UTF-8",
        ) from None
    inside, depth = text, 0
    while (unwrapped := unwrap(inside)) is not None:
        inside, depth = unwrapped, depth + 1
    if not inside:
        raise CheckpointError("the prompt has no tokens", fix="give a prompt that is not empty")
    return ChatPrompt("prompt", inside, roles=("given",), given=depth)


def chosen_prompts(names: Sequence[str] | None) -> tuple[ChatPrompt, ...]:
    """The upstream prompts of these names, all of them unless some are named.

    Raises:
        KeyError: with the first name that is unknown.
    """
    known = {prompt.name: prompt for prompt in UPSTREAM_PROMPTS}
    return UPSTREAM_PROMPTS if names is None else tuple(known[name] for name in dict.fromkeys(names))
