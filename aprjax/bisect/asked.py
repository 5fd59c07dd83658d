"""What a two-sided command was asked: prompts, positions, and where its results are to go."""

from __future__ import annotations

from pathlib import Path

from aprjax.bisect.open_sides import Opened
from aprjax.bisect.tokens.fed import TokensReport, tokenize_both
from aprjax.checkpoint.types import CheckpointError
from aprjax.text.probes import PROBES, Probe
from aprjax.text.prompt import read_prompt_file
from aprjax.trace.capture import chosen_positions

__all__ = ["asked_prompts", "check_destinations", "chosen_positions"]


def check_destinations(json_out: str | None, report: Path | None = None, save_trace: Path | None = None) -> None:
    """Refuses, before minutes of work, an output that could not be written after them.

    Raises:
        CheckpointError: a folder stands where a file is to be, the folder does not exist, or the reverse.
    """
    files = [Path(file) for file in (json_out, save_trace) if file is not None and str(file) != "-"]
    for file in files:
        if file.is_dir() or not file.absolute().parent.is_dir():
            found = "a folder stands there" if file.is_dir() else "there is no such folder"
            raise CheckpointError(f"cannot be written: {found}", file=file, fix="choose a file in a folder that exists")
    if report is not None and report.exists() and not report.is_dir():
        raise CheckpointError(
            "a file stands where the report's folder is to be", file=report, fix="choose another name"
        )


def asked_prompts(
    sides: tuple[Opened, Opened],
    *,
    prompt: str | None,
    prompt_file: Path | None,
    tokens: list[int] | None,
    wrap: str,
    probes: tuple[Probe, ...] = PROBES,
) -> list[TokensReport]:
    """The prompts of a two-sided command; unasked, a recorded trace's own tokens, or the probes.

    Raises:
        CheckpointError: the prompt cannot be read, or no side has a tokenizer that could encode it.
    """
    if tokens is not None:
        return [TokensReport("tokens", None, "none", tuple(tokens))]
    recorded = next((side.tokens for side in sides if side.tokens is not None), None)
    if recorded is not None and prompt is None and prompt_file is None:
        return [TokensReport("trace", None, "none", recorded)]
    known = [side.checkpoint for side in sides if side.checkpoint is not None]
    if not known:
        raise CheckpointError(
            "a prompt, and no file whose tokenizer could encode it",
            fix="leave the prompt out: the trace has its tokens",
        )
    model, ref = known[0], known[-1]
    if prompt_file is not None:
        prompt = read_prompt_file(prompt_file)
    if prompt is not None:
        return [tokenize_both(model, ref, name="prompt", text=prompt, times=wrap)]
    return [
        tokenize_both(model, ref, name=probe.name, text=probe.text, times=probe.wrap if wrap == "none" else wrap)
        for probe in probes
    ]
