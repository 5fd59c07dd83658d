"""What both sides are fed: one list of token ids, and whether both tokenizers make it."""

from __future__ import annotations

from dataclasses import dataclass

from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding
from aprjax.text import Tokenizer, wrap


@dataclass(frozen=True)
class TokensReport:
    """The tokens of one prompt.

    Attributes:
        name: of the probe, or "prompt".
        text: the prompt as given, before wrapping; None when token ids were given.
        wrap: how often it was wrapped in ChatML: none, once or twice.
        ids: the reference's ids: what both sides are fed.
        agree: the model's tokenizer makes the same ids, or has no say.
        reason: why not.
        findings: what was met on the way.
    """

    name: str
    text: str | None
    wrap: str
    ids: tuple[int, ...]
    agree: bool = True
    reason: str = ""
    findings: tuple[Finding, ...] = ()


def tokenize_both(model: Checkpoint, ref: Checkpoint, *, name: str, text: str, times: str) -> TokensReport:
    """The prompt's tokens by the reference's tokenizer, checked against the model's.

    A side without a vocabulary has no say, which is a finding; without any there is nothing to go by.

    Raises:
        CheckpointError: neither side has a vocabulary, or the prompt has no tokens.
    """
    wrapped = wrap(text, times)
    encoded: dict[str, list[int]] = {}
    findings: list[Finding] = []
    for side, checkpoint in (("ref", ref), ("model", model)):
        try:
            encoded[side] = Tokenizer.from_checkpoint(checkpoint).encode(wrapped)
        except CheckpointError as error:
            findings.append(Finding("tokenizer-missing", "warning", f"{side}: {error.message}"))
            if side == "model" and "ref" not in encoded:
                raise
    ids = encoded.get("ref", encoded.get("model", []))
    if not ids:
        raise CheckpointError("the prompt has no tokens", file=ref.path, fix="give a prompt that is not empty")
    agree = encoded.get("model", ids) == ids
    reason = "" if agree else _difference(encoded["model"], ids)
    if not agree:
        findings.append(Finding("tokens-differ", "error", reason))
    return TokensReport(name, text, times, tuple(ids), agree, reason, tuple(findings))


def _difference(ours: list[int], theirs: list[int]) -> str:
    length = min(len(ours), len(theirs))
    at = next((i for i in range(length) if ours[i] != theirs[i]), length)
    return (
        f"the tokenizers disagree from position {at}: the model's makes {ours[at : at + 4]} of {len(ours)} tokens, "
        f"the reference's {theirs[at : at + 4]} of {len(theirs)}"
    )
