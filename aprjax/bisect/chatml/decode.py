"""Continuations with the margin of every token, of many prompts, at the cost of one pass where a draft is right.

A continuation is *defined* by one forward pass: each of its tokens is the likeliest after all before it, as
computed over prompt and continuation together. Step-by-step decoding only proposes tokens, and so does another
side's or arithmetic's continuation of the same prompt; the pass accepts or corrects them. So a run does not depend
on what proposed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aprjax.bisect.chatml.cells import Continuation
from aprjax.bisect.chatml.store import Stored
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.loading import embed
from aprjax.qwen2.model import Qwen2, bucket, causal_context, precision_scope, run_head, run_layer, run_norm

# What shorter passes are padded to: with upstream's budget of 32 tokens its prompts, raw and wrapped, then share
# one compiled program for each arithmetic.
_SHORTEST_PASS = 64
# Positions of one pass through the head: their logits take 39 MB with Qwen2's vocabulary.
_HEAD_ROWS = 64


@dataclass(frozen=True)
class _Checked:
    """One pass over a proposed continuation: the likeliest token at each place, and what it led by."""

    best: np.ndarray
    runners_up: np.ndarray
    margins: np.ndarray
    first_logits: Float[np.ndarray, " vocab"]


def continue_all(
    model: Qwen2,
    prompts: Sequence[tuple[int, ...]],
    drafts: Sequence[tuple[int, ...] | None],
    *,
    max_new_tokens: int,
    backend: str,
    on_done: Callable[[int, Stored], None],
    on_step: Callable[[str], None] = lambda what: None,
) -> None:
    """Continues every prompt by exactly `max_new_tokens` tokens, stop tokens off.

    Args:
        model: what continues.
        prompts: token ids, at least one each.
        drafts: a likely continuation of each, of any length, or None.
        max_new_tokens: how many tokens, at least 1.
        backend: noted in every run.
        on_done: given the place of a prompt and its run, as soon as it is settled.
        on_step: told what is going on.
    """
    proposed = [tuple(draft or ())[:max_new_tokens] for draft in drafts]
    # How many tokens of each proposal a pass has confirmed.
    settled = [0] * len(prompts)
    left = list(range(len(prompts)))
    while left:
        short = [at for at in left if len(proposed[at]) < max_new_tokens]
        if short:
            on_step("decoding")
            fed = [list(prompts[at]) + list(proposed[at]) for at in short]
            # As many for all as the longest needs; what is too long is cut.
            need = max(max_new_tokens - len(proposed[at]) for at in short)
            for at, tokens in zip(short, generate_batch(model, fed, max_new_tokens=need), strict=True):
                proposed[at] = (*proposed[at], *tokens)[:max_new_tokens]
        again = []
        for at in left:
            on_step("checking")
            checked = _check(model, prompts[at], proposed[at])
            wrong = np.flatnonzero(checked.best != np.asarray(proposed[at]))
            # What a pass has settled stays so: each round settles one more token at least, so this ends.
            wrong = wrong[wrong >= settled[at]]
            if wrong.size == 0:
                on_done(at, _stored(prompts[at], proposed[at], checked, backend))
                continue
            place = int(wrong[0])
            proposed[at] = (*proposed[at][:place], int(checked.best[place]))
            settled[at] = place + 1
            again.append(at)
        left = again


def _stored(prompt: tuple[int, ...], tokens: tuple[int, ...], checked: _Checked, backend: str) -> Stored:
    run = Continuation(
        prompt_tokens=prompt,
        tokens=tokens,
        margins=tuple(checked.margins.tolist()),
        runners_up=tuple(checked.runners_up.tolist()),
        backend=backend,
    )
    return Stored(run, checked.first_logits)


def _check(model: Qwen2, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> _Checked:
    """The likeliest token at every place of a continuation, given all tokens before it."""
    arithmetic, config = model.arithmetic, model.config
    fed = [*prompt, *continuation[:-1]]
    # One length for every continuation of this prompt: the same program, and the same rounding.
    length = bucket(max(_SHORTEST_PASS, len(prompt) + len(continuation)))
    rows = np.zeros((length, config.hidden_size), np.float32)
    rows[: len(fed)] = embed(model.checkpoint, fed)
    best, second, margins, first = [], [], [], None
    with precision_scope(arithmetic):
        hidden = jnp.asarray(rows).astype(arithmetic.dtype)
        context = causal_context(config, arithmetic, length=length)
        for layer in model.layers:
            hidden, _, _ = run_layer(layer, hidden, context, {}, {}, arithmetic=arithmetic, capture=False)
        for start in range(len(prompt) - 1, len(fed), _HEAD_ROWS):
            count = min(_HEAD_ROWS, len(fed) - start)
            places = np.minimum(np.arange(start, start + min(_HEAD_ROWS, len(continuation))), length - 1)
            normed = run_norm(model.norm, hidden[places], arithmetic=arithmetic)
            logits = np.array(run_head(model.head, normed, arithmetic=arithmetic))[:count]
            if first is None:
                first = logits[0].astype(np.float32)
            picked, runner, margin = _best_two(logits)
            best.append(picked)
            second.append(runner)
            margins.append(margin)
    assert first is not None
    return _Checked(np.concatenate(best), np.concatenate(second), np.concatenate(margins), first)


def _best_two(logits: Float[np.ndarray, "position vocab"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest token of each row, the second, and the difference; among equals the lower id is the likelier."""
    rows = np.arange(len(logits))
    # NaN is never the largest: a row of them yields token 0, as upstream's engines do.
    logits = np.where(np.isnan(logits), -np.inf, logits)
    best = logits.argmax(axis=1)
    highest = logits[rows, best].astype(np.float64)
    logits[rows, best] = -np.inf
    second = logits.argmax(axis=1)
    with np.errstate(invalid="ignore"):
        margins = highest - logits[rows, second].astype(np.float64)
    return best, second, np.where(np.isfinite(margins), margins, 0.0)
