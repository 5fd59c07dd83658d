"""`run` in words: what was fed, and how it went."""

from __future__ import annotations

from aprjax.qwen2.generate import Stop
from aprjax.qwen2.run import Fed, RunReport


def fed_lines(fed: Fed) -> list[str]:
    """What the model is given: the text, each token with its id, special ones marked, and the notes."""
    lines = [f"fed: {len(fed.tokens)} tokens, wrap {fed.wrap}"]
    if fed.text is not None:
        lines.append(f"text: {fed.text!r}")
    if fed.pieces:
        pairs = zip(fed.tokens, fed.pieces, strict=True)
        lines += [f"{token:>8}  {piece}{'  (special)' if token in fed.special else ''}" for token, piece in pairs]
    else:
        lines.append(f"tokens: {', '.join(map(str, fed.tokens))}")
    return [*lines, *note_lines(fed)]


def note_lines(fed: Fed) -> list[str]:
    """What about the prompt may not be what was meant."""
    return [f"note: {note}" for note in fed.notes]


def run_lines(report: RunReport) -> list[str]:
    """Speed, and why it ended."""
    prompt, made = len(report.fed.tokens), len(report.tokens)
    decode = "" if report.decode_rate is None else f", {report.decode_rate:.1f} tokens/s after the first two"
    ended = {
        Stop.TOKEN: f"the stop token {report.stop_token} ({report.tokens[-1] if report.tokens else ''})",
        Stop.BUDGET: f"the budget of {made} tokens (--max-new-tokens)",
        Stop.CONTEXT: f"the context: {prompt} + {made} tokens fill it",
    }[report.stop]
    lines = [
        f"prompt: {prompt} tokens in {report.prefill_seconds:.2f} s ({report.prefill_rate:.1f} tokens/s)",
        f"continuation: {made} tokens{decode}; ended by {ended}",
        f"arithmetic: {report.arithmetic}; {_sampling(report)}",
    ]
    if report.without_text:
        ids = ", ".join(map(str, dict.fromkeys(report.without_text)))
        lines.append(f"warning: tokens that no entry of the vocabulary stands for were generated: {ids}")
    return lines


def _sampling(report: RunReport) -> str:
    if report.sampling.greedy:
        return "greedy"
    how = report.sampling
    top_k = f", top-k {how.top_k}" if how.top_k else ""
    top_p = f", top-p {how.top_p:g}" if how.top_p < 1 else ""
    return f"temperature {how.temperature:g}{top_k}{top_p}, seed {report.seed}"
