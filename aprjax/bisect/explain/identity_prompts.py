"""What the tokens that were really run say, next to those that were claimed: BOS, template, offset, tokenization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.explain.identity_tokens import RecoveredTokens
from aprjax.checkpoint.types import Checkpoint, CheckpointError, Severity
from aprjax.text import is_wrapped, wrap
from aprjax.text.tokenizer import TextError, Tokenizer
from aprjax.text.wrapping import nested_turns

# Ids named in a sentence; the evidence has all.
_SHOWN = 8
_AGAIN = "trace again with the tokens that are to be compared, or compare on those that were run: --tokens {}"


@dataclass(frozen=True)
class _Said:
    """Two sequences of tokens, and their texts where the file has a tokenizer."""

    found: tuple[int, ...]
    claimed: tuple[int, ...]
    checkpoint: Checkpoint

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        try:
            return Tokenizer.from_checkpoint(self.checkpoint)
        except CheckpointError:
            return None

    def text(self, ids: tuple[int, ...]) -> str | None:
        try:
            return None if self.tokenizer is None else self.tokenizer.decode(ids)
        except TextError:
            return None

    def special(self, token: int) -> bool:
        """Whether a token is one that begins sequences, or another control token."""
        vocabulary = self.checkpoint.vocabulary
        if vocabulary is None:
            return False
        return token == vocabulary.bos_token_id or (self.tokenizer is not None and token in self.tokenizer.special_ids)

    def named(self, token: int) -> str:
        try:
            return f"{token} {self.tokenizer.token(token)!r}" if self.tokenizer is not None else str(token)
        except TextError:
            return str(token)


def token_findings(
    recovered: RecoveredTokens, claimed: tuple[int, ...] | None, checkpoint: Checkpoint
) -> tuple[IdentityFinding, ...]:
    """What is to be said of the tokens that a trace's rows are of; nothing where they are those claimed.

    Args:
        recovered: from the rows.
        claimed: what was said to be fed; None where nothing was said.
        checkpoint: whose tokenizer tells what they say.
    """
    found = recovered.known
    if found is None:
        return (_unknown(recovered),)
    if claimed is not None and len(claimed) == len(found):
        equal = [c in (f, *recovered.ties.get(f, ())) for f, c in zip(found, claimed, strict=True)]
        # Of equal rows the claimed token's is as good as any.
        found = tuple(c if same else f for f, c, same in zip(found, claimed, equal, strict=True))
    said = _Said(found, claimed or (), checkpoint)
    if claimed is None:
        return (_proposal(said, recovered), *_nested(said, recovered))
    if found == claimed:
        return _nested(said, recovered)
    kind, words = _difference(said)
    if kind == "":
        return ()
    evidence = {"run": list(found), "claimed": list(claimed), "text": said.text(found)}
    ids = ",".join(map(str, found))
    confidence = _confidence(recovered)
    rows_moved = kind in ("tokens-differ", "tokens-offset") and _one_for_each(found, claimed)
    if rows_moved:
        doubt = "each claimed token stands for one other, so an embedding whose rows were moved would look the same"
        confidence = Confidence(Level.WEAK, f"{confidence.basis}; {doubt}")
    return (
        IdentityFinding(
            kind,
            f"the trace was not made of the tokens that are claimed: {words} ({recovered.source} are those of "
            f"{_shown(found)}, claimed are {_shown(claimed)})",
            _NEXT.get(kind, _AGAIN).format(ids),
            confidence,
            severity="warning" if rows_moved else "error",
            evidence=evidence,
        ),
    )


_NEXT = {
    "template-wrapped-twice": "give the prompt to one of the two that wrap it, not to both; the tokens that were run: "
    "--tokens {}",
    "bos-prepended": "switch add_bos off (no Qwen2 was trained with one), or compare on what was run: --tokens {}",
}


def _difference(said: _Said) -> tuple[str, str]:
    """A slug, and what happened to the claimed tokens in words; an empty slug where rows are merely left out."""
    found, claimed = said.found, said.claimed
    if found[1:] == claimed:
        kind = "bos-prepended" if said.special(found[0]) else "tokens-shifted"
        return kind, f"the token {said.named(found[0])} stands before them"
    if found == claimed[1:] and said.special(claimed[0]) and len(found) > 1:
        return "bos-missing", f"the first one, {said.named(claimed[0])}, is left out"
    by_text = _by_text(said)
    if by_text is not None:
        return by_text
    if len(found) < len(claimed) and _is_part(found, claimed):
        return "", ""
    if len(found) == len(claimed):
        if found == claimed[::-1]:
            return "tokens-reordered", "they are in reverse order"
        for step in (1, -1):
            ours, theirs = (found[step:], claimed[:-step]) if step > 0 else (found[:step], claimed[-step:])
            if len(ours) > 1 and ours == theirs:
                return "tokens-shifted", f"they are shifted by one position to the {'right' if step > 0 else 'left'}"
        if sorted(found) == sorted(claimed):
            return "tokens-reordered", "they are in another order"
    if len(found) > len(claimed) > 1 and _is_part(claimed, found):
        extra = len(found) - len(claimed)
        return "tokens-added", f"{extra} more {'tokens stand' if extra > 1 else 'token stands'} around them"
    pairs = list(zip(found, claimed, strict=False))
    steps = {f - c for f, c in pairs}
    if len(found) == len(claimed) and len(steps) == 1:
        return "tokens-offset", f"every id is the claimed one {steps.pop():+d}"
    at = next((i for i, (f, c) in enumerate(pairs) if f != c), len(pairs))
    same = sum(f == c for f, c in pairs)
    return "tokens-differ", f"{same} of {len(claimed)} agree, the first that does not is at position {at}"


def _by_text(said: _Said) -> tuple[str, str] | None:
    found, claimed = said.text(said.found), said.text(said.claimed)
    if found is None or claimed is None:
        return None
    if found == claimed:
        return "other-tokenization", "the same text is cut into other tokens"
    for times, words in (("once", "once more"), ("twice", "twice more")):
        if found == wrap(claimed, times):
            twice = is_wrapped(claimed) or times == "twice"
            return "template-wrapped-twice" if twice else "template-added", f"the template was put around it {words}"
        if claimed == wrap(found, times):
            return "template-missing", "the template is not around it" + (" as often" if is_wrapped(found) else "")
    if found.endswith(claimed) and found.startswith("<|im_start|>system\n"):
        return "template-added", "a system turn stands before it"
    if found.strip() == claimed.strip():
        return "tokens-differ", "the texts differ in white space at their ends alone"
    return None


def _one_for_each(found: tuple[int, ...], claimed: tuple[int, ...]) -> bool:
    """Whether equal claimed tokens are found as equal ones."""
    return len(found) == len(claimed) and len(set(zip(found, claimed, strict=True))) == len(set(claimed))


def _is_part(short: tuple[int, ...], long: tuple[int, ...]) -> bool:
    return any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))


def _nested(said: _Said, recovered: RecoveredTokens) -> tuple[IdentityFinding, ...]:
    text = said.text(said.found)
    if text is None or not nested_turns(text):
        return ()
    return (
        IdentityFinding(
            "template-wrapped-twice",
            "the prompt that was run has a ChatML turn inside another: the template was put around it twice",
            "give the bare prompt to what wraps it, or the wrapped one to what does not",
            _confidence(recovered),
            severity="warning",
            evidence={"text": text, "turns": list(nested_turns(text))},
        ),
    )


def _proposal(said: _Said, recovered: RecoveredTokens) -> IdentityFinding:
    text = said.text(said.found)
    named = "" if text is None else f": {text!r}"
    severity: Severity = "info"
    return IdentityFinding(
        "tokens-recovered",
        f"{recovered.source} are those of the tokens {_shown(said.found)}{named}",
        f"take them for the trace's: --tokens {','.join(map(str, said.found))}",
        _confidence(recovered),
        severity=severity,
        evidence={"run": list(said.found), "text": text, "ties": {str(k): list(v) for k, v in recovered.ties.items()}},
    )


def _unknown(recovered: RecoveredTokens) -> IdentityFinding:
    lost = [row for row, token in enumerate(recovered.ids) if token is None]
    return IdentityFinding(
        "tokens-unknown",
        f"{len(lost)} of {len(recovered.ids)} rows (the first is {lost[0] if lost else 0}) are no row of this file's "
        f"embedding: the nearest is {recovered.distance:.2g} of its norm away",
        "give the file that was run; if it is this one, its embedding was read otherwise",
        Confidence(Level.STRONG, f"every row of the vocabulary was tried against {recovered.source}"),
        severity="warning",
        evidence={"rows": lost, "distance": recovered.distance},
    )


def _confidence(recovered: RecoveredTokens) -> Confidence:
    if recovered.exact and not recovered.ties:
        return Confidence(Level.CERTAIN, "every row is its token's row of the embedding, bit for bit")
    basis = f"every row is within {recovered.distance:.1e} of its token's ({recovered.source})"
    if recovered.ties:
        token, others = next(iter(recovered.ties.items()))
        basis += f"; the rows of {token} and {', '.join(map(str, others))} are equal, so that none can be told"
    return Confidence(Level.STRONG, basis)


def _shown(ids: tuple[int, ...]) -> str:
    return ",".join(map(str, ids[:_SHOWN])) + (f",… ({len(ids)})" if len(ids) > _SHOWN else "")
