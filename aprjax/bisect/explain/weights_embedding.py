"""Accidents of the embedding's rows: those of the tokens at hand are the trace's own values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Node, Parameter
from aprjax.bisect.explain.identity_tokens import recover_tokens
from aprjax.bisect.explain.proposals import with_error
from aprjax.bisect.explain.unseen import FACTOR_ERROR
from aprjax.bisect.explain.weights_look import with_rows, with_weights
from aprjax.bisect.explanations.block_fields import CHANGES
from aprjax.bisect.replay.judge import row_distances
from aprjax.blocks import block_format
from aprjax.checkpoint.types import EncodedTensor
from aprjax.qwen2.stages import OUTSIDE, Stage

NAME = "model.embed_tokens.weight"
_NODE = (OUTSIDE, Stage.EMBEDDING)
# Rows are looked up, not multiplied: a prediction is met to the rounding of float32.
_MET = 1e-5
# Elements of a matrix that is held as floats.
_MOST_FLOATS = 1 << 24


def _rows(evidence: Evidence, node: Node) -> tuple[np.ndarray, np.ndarray, EncodedTensor] | None:
    """Found and expected, `float64[position, hidden]`, and the matrix; None for other nodes, and for sound ones."""
    found, tensor = evidence.value(node), evidence.tensor(NAME)
    if node != _NODE or found is None or tensor is None or not np.isfinite(found).all():
        return None
    if block_format(tensor.block_type).flat:
        return None
    expected = np.asarray(evidence.expected(node), np.float64)
    return None if _met(found, expected) else (found.astype(np.float64), expected, tensor)


def _met(found: np.ndarray, predicted: np.ndarray) -> bool:
    return bool((row_distances(found, predicted) <= _MET).all())


def _candidate(words: str, weights: EncodedTensor | np.ndarray, **told: object) -> Candidate:
    return Candidate(words, with_weights({NAME: weights}), dict(told), scope=frozenset({_NODE}))


def zeroed(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """Rows of zeros."""
    known = _rows(evidence, node)
    if known is None:
        return
    found, expected, tensor = known
    wrong = row_distances(found, expected) > _MET
    if wrong.any() and not found[wrong].any():
        tokens = sorted({token for token, bad in zip(evidence.trace.info.tokens, wrong, strict=True) if bad})
        source = np.arange(tensor.shape[0])
        source[tokens] = -1
        words = "the embedding is zero" if wrong.all() else f"the embedding's rows {_named(tokens)} are zero"
        yield _candidate(words, with_rows(tensor, source), rows=tokens)


def scaled(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """One factor."""
    known = _rows(evidence, node)
    if known is None or known[2].size > _MOST_FLOATS:
        return
    found, expected, tensor = known
    size = float(np.square(expected).sum())
    factor = float((found * expected).sum() / size) if size else 0.0
    if factor and _met(found, factor * expected):
        error = float(np.linalg.norm(found - factor * expected) / np.sqrt(size)) + FACTOR_ERROR * abs(factor)
        values = tensor.decode() * np.float32(factor)
        words = f"the embedding is multiplied by {with_error(factor, error)}"
        yield _candidate(words, values, factor=Parameter(factor, error, 1.0))


def another_tensor(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """The head's rows."""
    known, head = _rows(evidence, node), evidence.checkpoint.tensors.get("lm_head.weight")
    if known is None or head is None or head.shape != known[2].shape or block_format(head.block_type).flat:
        return
    tokens = np.asarray(evidence.trace.info.tokens)
    if _met(known[0], head.decode_rows(tokens)):
        words = "lm_head stands in the place of the embedding"
        yield _candidate(words, replace(head, name=NAME), tensor="lm_head.weight")


def shifted(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """Every token's row is that of a token so many ids away."""
    known = _rows(evidence, node)
    if known is None:
        return
    found, _, tensor = known
    tokens, size = np.asarray(evidence.trace.info.tokens), tensor.shape[0]
    for step in (1, -1):
        if _met(found, tensor.decode_rows((tokens - step) % size)):
            words = f"the embedding's rows are shifted {'down' if step > 0 else 'up'} by one"
            yield _candidate(words, with_rows(tensor, (np.arange(size) - step) % size), by=step)


def reversed_columns(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """Every row reversed."""
    known = _rows(evidence, node)
    if known is not None and known[2].size <= _MOST_FLOATS and _met(known[0], known[1][:, ::-1]):
        yield _candidate("every row of the embedding is reversed", known[2].decode()[:, ::-1], axis="columns")


def overwritten(evidence: Evidence, node: Node) -> Iterator[Candidate]:
    """Some tokens' rows are other tokens'."""
    known = _rows(evidence, node)
    if known is None:
        return
    found, expected, tensor = known
    tokens = np.asarray(evidence.trace.info.tokens)
    wrong = np.flatnonzero(row_distances(found, expected) > _MET)
    recovered = recover_tokens(found[wrong].astype(np.float32), evidence.checkpoint) if wrong.size else None
    if recovered is None or recovered.known is None or recovered.distance > _MET:
        return
    source = np.arange(tensor.shape[0])
    pairs = dict(zip(tokens[wrong].tolist(), recovered.known, strict=True))
    for token, other in pairs.items():
        source[token] = other
    if not _met(found, tensor.decode_rows(source[tokens])):
        return  # one token with two rows: it was another token that ran
    named = ", ".join(f"{token} holds that of {other}" for token, other in list(pairs.items())[:4])
    words = f"the embedding's row {named}" if len(pairs) == 1 else f"rows of the embedding are others' (row {named})"
    yield _candidate(words, with_rows(tensor, source), rows={str(k): v for k, v in pairs.items()})


def changed_fields(slug: str) -> Callable[[Evidence, Node], Iterator[Candidate]]:
    """The blocks after one of `files`' accidents of packing or unpacking."""

    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        known = _rows(evidence, node)
        if known is None:
            return
        found, _, tensor = known
        blocks = block_format(tensor.block_type)
        tokens = np.asarray(evidence.trace.info.tokens)
        for words, change in CHANGES[slug](tensor.block_type):
            some = np.ascontiguousarray(tensor.packed()[tokens]).reshape(-1, blocks.block_bytes).copy()
            change(some)
            with np.errstate(all="ignore"):
                values = blocks.decode(some).reshape(len(tokens), -1)[:, : tensor.shape[1]]
            if not _met(found, values):
                continue
            whole = tensor.data.reshape(-1, blocks.block_bytes).copy()
            change(whole)
            yield _candidate(f"the embedding: {words}", replace(tensor, data=whole.reshape(-1)), type=tensor.block_type)

    return test


def _named(tokens: list[int]) -> str:
    return ", ".join(map(str, tokens[:4])) + (" …" if len(tokens) > 4 else "")
