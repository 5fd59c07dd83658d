"""The words of the factorial: runs, conditions, outcomes, cells. Plain values; nothing is computed by a model here.

A *run* is one greedy continuation with stop tokens off. A *condition* says how a side is run and what ends
it; its *outcome* is cut from a run, so that stop tokens on and off cost one decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aprjax.bisect.chatml.prompts import ChatPrompt

Side = Literal["model", "ref"]
# `on`: where llama.cpp ends generation by this file (declared ids, and ids by the name of their tokens).
# `declared`: at the ids that the file's metadata declares, and nowhere else. `off`: nowhere.
Stop = Literal["on", "declared", "off"]
STOPS: tuple[Stop, ...] = ("on", "declared", "off")
SIDES: tuple[Side, ...] = ("model", "ref")


@dataclass(frozen=True, order=True)
class RunKey:
    """Which run: whose weights, which prompt, how computed, and whose tokenizer made the ids.

    `ids_of` is `model` only where the model's tokenizer makes other ids than the reference's.
    """

    side: Side
    prompt: str
    wrap: str
    arithmetic: str
    ids_of: Side = "ref"


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation with stop tokens off.

    Attributes:
        prompt_tokens: the ids that were fed.
        tokens: the continuation.
        margins: of each token of it: its logit less the largest other one.
        runners_up: the token of that other logit.
        backend: what computed it: platform, device, versions.
        shared_with: the run that this one stands for by proof, and by which; empty if it was run itself.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    runners_up: tuple[int, ...]
    backend: str
    shared_with: str = ""


@dataclass(frozen=True)
class Condition:
    """How a side is run, and what ends it.

    Attributes:
        side: whose weights.
        wrap: none, once or twice.
        arithmetic: a preset's name.
        stop: see `Stop`.
        ids_of: whose tokenizer encodes the prompt.
        stops_of: whose stop tokens count, as the file declares them.
        names_of: whose vocabulary says which id a special token has.
        special_rows_of: whose embedding and head rows of special tokens are used.
    """

    side: Side
    wrap: str
    arithmetic: str
    stop: Stop
    ids_of: Side = "ref"
    stops_of: Side = "ref"
    names_of: Side = "ref"
    special_rows_of: Side = "ref"

    @classmethod
    def as_run(cls, side: Side, wrap: str, arithmetic: str, stop: Stop) -> Condition:
        """A side with everything its own."""
        return cls(side, wrap, arithmetic, stop, side, side, side, side)


@dataclass(frozen=True)
class Comparison:
    """One prompt under a condition of each side."""

    prompt: str
    model: Condition
    ref: Condition


@dataclass(frozen=True)
class SideFacts:
    """What a side is, as far as stop tokens and special tokens go.

    Attributes:
        path: of the file.
        sha256: of the file.
        format: gguf, apr or safetensors.
        declared_stops: ids at which the metadata declares an answer to end.
        named_stops: ids at which llama.cpp ends by the names of the tokens.
        has_tokenizer: whether the file has a vocabulary of its own.
    """

    path: str
    sha256: str
    format: str
    declared_stops: frozenset[int]
    named_stops: frozenset[int]
    has_tokenizer: bool = True


@dataclass(frozen=True)
class PairFacts:
    """What the files say of each other without being run.

    Attributes:
        identical_weights: all tensors in the same bytes, and equal configs.
        special_rows: texts of special tokens whose embedding or head rows differ.
        special_row_ids: their ids.
        only_special_rows: nothing else of the weights differs.
        head_differs: one of these rows is the output head's.
        equal_values: what differs in bytes decodes to the same values.
        special_ids: special tokens with another id on the two sides: text, model's id, reference's id.
        ids_differ: prompts (name, wrap) of which the two tokenizers make other ids.
        only_special_ids: they differ in nothing but special tokens.
        files_sentence: what comparing the files came to.
    """

    identical_weights: bool
    special_rows: tuple[str, ...] = ()
    special_row_ids: frozenset[int] = frozenset()
    only_special_rows: bool = False
    head_differs: bool = False
    equal_values: bool = False
    special_ids: tuple[tuple[str, int | None, int | None], ...] = ()
    ids_differ: frozenset[tuple[str, str]] = frozenset()
    only_special_ids: bool = True
    files_sentence: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a condition yields: the tokens up to and including a stop token, and whether one was met."""

    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class FirstLogits:
    """How near two runs are at the first token: what upstream calls forward parity.

    Attributes:
        left: one run.
        right: the other.
        cosine: of the two vectors of logits.
        same_top1: whether both choose the same token.
        max_delta: the largest difference of a logit.
        kl: KL divergence, in nats.
    """

    left: RunKey
    right: RunKey
    cosine: float
    same_top1: bool
    max_delta: float
    kl: float


@dataclass(frozen=True)
class Factorial:
    """Everything measured: the table that `causes` and `claims` read.

    Attributes:
        prompts: by name.
        wraps: of none, once, twice.
        arithmetics: presets' names.
        max_new_tokens: the budget of every run.
        runs: every run, those shared by proof included.
        sides: by name.
        facts: of the files.
        first_logits: of the pairs of runs that forward parity is asked of.
        noise: measured sigma of a logit by the two arithmetics of a comparison.
        backend: the one backend of every run.
    """

    prompts: Mapping[str, ChatPrompt]
    wraps: tuple[str, ...]
    arithmetics: tuple[str, ...]
    max_new_tokens: int
    runs: Mapping[RunKey, Continuation]
    sides: Mapping[Side, SideFacts]
    facts: PairFacts
    first_logits: tuple[FirstLogits, ...] = ()
    noise: Mapping[tuple[str, str], float] = field(default_factory=dict)
    backend: str = ""

    def run_of(self, prompt: str, condition: Condition) -> Continuation | None:
        """The run that a condition's outcome is cut from; None where it was not measured."""
        side = condition.side
        if side == "model" and condition.special_rows_of == "ref" and self.facts.special_rows:
            if not self.facts.only_special_rows:
                return None
            # With the reference's special rows the model's weights are the reference's, byte for byte.
            side = "ref"
        ids_of = condition.ids_of if (prompt, condition.wrap) in self.facts.ids_differ else "ref"
        return self.runs.get(RunKey(side, prompt, condition.wrap, condition.arithmetic, ids_of))

    def stop_ids(self, condition: Condition) -> frozenset[int]:
        """The ids that end a condition's answer."""
        if condition.stop == "off":
            return frozenset()
        declared = self.sides[condition.stops_of].declared_stops
        return declared if condition.stop == "declared" else declared | self.sides[condition.names_of].named_stops

    def outcome(self, prompt: str, condition: Condition) -> Outcome | None:
        """A condition's outcome; None where its run was not measured."""
        run = self.run_of(prompt, condition)
        return None if run is None else cut(run, self.stop_ids(condition))


def cut(run: Continuation, stop_ids: frozenset[int]) -> Outcome:
    """A run up to and including its first stop token."""
    for index, token in enumerate(run.tokens):
        if token in stop_ids:
            return Outcome(run.tokens[: index + 1], True)
    return Outcome(run.tokens, False)
