"""One run of one checkpoint: what was fed, what came, why it ended, and how fast. `render_run` prints it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.generate import Generation, Stop, generate, room_after
from aprjax.qwen2.model import Qwen2
from aprjax.qwen2.sampling import GREEDY, Sampling
from aprjax.text.lookalikes import oddities
from aprjax.text.streaming import Detokenizer
from aprjax.text.template import wrap
from aprjax.text.tokenizer import Tokenizer
from aprjax.text.wrapping import nested_turns

SCHEMA = "aprjax/run/1"

# What is written like a special token of Qwen's.
_MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>")


@dataclass(frozen=True)
class Fed:
    """What a model is given, to the token.

    Attributes:
        prompt: the user's text; None where token ids were given.
        wrap: how often it was wrapped in a ChatML user turn.
        text: the text after wrapping; for ids what they decode to; None without a tokenizer.
        tokens: token ids.
        pieces: each token in readable form; empty without a tokenizer.
        special: which of the ids are special tokens.
        notes: what about the prompt may not be what was meant.
    """

    prompt: str | None
    wrap: str
    text: str | None
    tokens: tuple[int, ...]
    pieces: tuple[str, ...] = ()
    special: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "prompt": self.prompt,
            "wrap": self.wrap,
            "text": self.text,
            "tokens": list(self.tokens),
            "pieces": list(self.pieces),
            "special": sorted(self.special & set(self.tokens)),
            "notes": list(self.notes),
        }


def fed_text(checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: str, times: str) -> Fed:
    """A prompt as the checkpoint's own tokenizer has it.

    Raises:
        CheckpointError: it has no tokens, or more than the context holds.
        TextError: it cannot be encoded.
    """
    text = wrap(prompt, times)
    fed = _fed(tokenizer, tokenizer.encode(text), prompt=prompt, wrap=times, text=text)
    room_after(checkpoint, len(fed.tokens))
    return fed


def fed_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer | None, tokens: list[int]) -> Fed:
    """Token ids as they are.

    Raises:
        CheckpointError: there are none, more than the context holds, or some beyond the embedding's rows.
    """
    room_after(checkpoint, len(tokens))
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    beyond = [token for token in tokens if not 0 <= token < rows]
    if beyond:
        raise CheckpointError(
            f"token id {beyond[0]} lies outside the embedding's {rows} rows",
            file=checkpoint.path,
            tensor="model.embed_tokens.weight",
            fix="the tokens belong to another vocabulary",
        )
    if tokenizer is None:
        return Fed(None, "none", None, tuple(tokens))
    known = [token for token in tokens if token < len(tokenizer)]
    return _fed(tokenizer, tokens, prompt=None, wrap="none", text=tokenizer.decode(known))


def _fed(tokenizer: Tokenizer, tokens: list[int], *, prompt: str | None, wrap: str, text: str) -> Fed:
    special = {tokenizer.vocabulary.tokens[index] for index in tokenizer.special_ids}
    notes = [oddity.sentence() for oddity in oddities(text, special)]
    for marker in dict.fromkeys(_MARKER.findall(text)):
        if marker not in special:
            count = len(tokenizer.encode(marker))
            notes.append(f"{marker!r} is no special token of this file: it is {count} tokens of ordinary text")
    notes += [f"a turn begins inside a turn at byte {at}: the prompt was wrapped before" for at in nested_turns(text)]
    beyond = sorted({token for token in tokens if token >= len(tokenizer)})
    if beyond:
        notes.append(f"ids {beyond} are rows of the embedding that no token of the vocabulary stands for")
    pieces = tuple(tokenizer.token(token) if token < len(tokenizer) else "" for token in tokens)
    return Fed(prompt, wrap, text, tuple(tokens), pieces, tokenizer.special_ids, tuple(notes))


@dataclass(frozen=True)
class RunReport:
    """A finished run.

    Attributes:
        file: the checkpoint.
        sha256: its digest; None where it was not asked for.
        arithmetic: how it was computed.
        fed: the prompt.
        tokens: the continuation; a stop token that ended it is the last.
        text: what they say, the stop token left out; None without a tokenizer.
        stop: why it ended.
        stop_token: the piece of the token that ended it.
        sampling: how tokens were chosen.
        seed: what they were drawn with; None for greedy.
        prefill_seconds: until the first token was chosen; programs that were compiled for it count.
        decode_seconds: from the second token to the last: the step before it may have compiled, too.
        generation_seconds: from the first token to the last.
        without_text: tokens of the continuation that no entry of the vocabulary stands for.
    """

    file: str
    sha256: str | None
    arithmetic: str
    fed: Fed
    tokens: tuple[int, ...]
    text: str | None
    stop: Stop
    stop_token: str | None
    sampling: Sampling
    seed: int | None
    prefill_seconds: float
    decode_seconds: float
    generation_seconds: float
    without_text: tuple[int, ...] = field(default=())

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt in a second."""
        return len(self.fed.tokens) / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens in a second; None for fewer than three."""
        return (len(self.tokens) - 2) / self.decode_seconds if len(self.tokens) > 2 else None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            "schema": SCHEMA,
            "file": self.file,
            "sha256": self.sha256,
            "arithmetic": self.arithmetic,
            "fed": self.fed.to_json(),
            "sampling": {**self.sampling.to_json(), "seed": self.seed},
            "tokens": list(self.tokens),
            "text": self.text,
            "stop": self.stop.value,
            "stop_token": self.stop_token,
            "tokens_without_text": list(self.without_text),
            "seconds": {"prefill": self.prefill_seconds, "generation": self.generation_seconds},
            "tokens_per_second": {"prefill": self.prefill_rate, "decode": self.decode_rate},
        }


def run(
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    fed: Fed,
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer | None,
    stop_ids: frozenset[int],
    sampling: Sampling = GREEDY,
    write: Callable[[str], None] = lambda text: None,
    digest: bool = False,
) -> RunReport:
    """Loads the model and continues what is fed, handing over text as soon as it is certain.

    Args:
        checkpoint: the file.
        arithmetic: how it computes.
        fed: what it is given.
        max_new_tokens: the most tokens that are made.
        tokenizer: the file's own; without one there is no text.
        stop_ids: the first of these ends it.
        sampling: how tokens are chosen.
        write: called with every piece of text.
        digest: compute the file's SHA-256.

    Raises:
        CheckpointError: the file does not run as a Qwen2, or its logits are not finite.
    """
    model = Qwen2(checkpoint, arithmetic)
    generation = generate(model, fed.tokens, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    parts: list[str] = []
    times = [time.perf_counter()]

    def emit(part: str) -> None:
        if part:
            parts.append(part)
            write(part)

    for token in generation:
        times.append(time.perf_counter())
        if detokenizer is not None and generation.stop is not Stop.TOKEN:
            emit(detokenizer.feed(token))
    if detokenizer is not None:
        emit(detokenizer.finish())
    assert generation.stop is not None
    return RunReport(
        file=str(checkpoint.path),
        sha256=checkpoint.sha256() if digest else None,
        arithmetic=arithmetic.name,
        fed=fed,
        tokens=tuple(generation.tokens),
        text=None if detokenizer is None else "".join(parts),
        stop=generation.stop,
        stop_token=_ended_by(generation, tokenizer),
        sampling=sampling,
        seed=None if sampling.greedy else generation.seed,
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[-1] - times[2] if len(times) > 2 else 0.0,
        generation_seconds=times[-1] - times[1],
        without_text=() if detokenizer is None else tuple(detokenizer.without_text),
    )


def _ended_by(generation: Generation, tokenizer: Tokenizer | None) -> str | None:
    if generation.stop is not Stop.TOKEN:
        return None
    last = generation.tokens[-1]
    known = tokenizer is not None and last < len(tokenizer)
    return tokenizer.token(last) if known and tokenizer is not None else str(last)
