"""What `python -m aprjax run` does: open, encode, generate, print as it comes, check, write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.python_check import Checked, check_run, make_folder, write_check
from aprjax.qwen2.render_run import fed_lines, note_lines, run_lines
from aprjax.qwen2.run import Fed, RunReport, fed_text, fed_tokens, run
from aprjax.qwen2.sampling import Sampling
from aprjax.text.prompt import read_prompt_file
from aprjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Outcome:
    """A run, and what the parser says of its Python where that was asked for."""

    report: RunReport
    checked: Checked | None

    @property
    def passes(self) -> bool:
        """Whether nothing that was checked failed."""
        return self.checked is None or self.checked.result.parses

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        python = None if self.checked is None else self.checked.to_json()
        return {**self.report.to_json(), "python": python}


def run_file(
    file: str,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    times: str = "none",
    max_new_tokens: int,
    sampling: Sampling,
    arithmetic: str,
    ignore_stop: bool = False,
    stop_ids: frozenset[int] = frozenset(),
    python_check: Path | None = None,
    digest: bool = False,
    streams: bool = True,
    verbose: bool = False,
    say: Callable[[str], None],
) -> Outcome:
    """Runs a file as the command line asks; see `aprjax.cli_run.run` for the options.

    Text goes to stdout as it comes if `streams`; what else there is to say is said line by line through `say`.

    Raises:
        CheckpointError: the file or the prompt cannot be read, or a result cannot be written.
        TextError: the prompt cannot be encoded.
    """
    enable_compilation_cache()
    text = prompt if prompt_file is None else read_prompt_file(prompt_file)
    checkpoint = open_checkpoint(file)
    tokenizer = _tokenizer(checkpoint, needed=text is not None or python_check is not None)
    fed = _fed(checkpoint, tokenizer, text, tokens, times)
    if python_check is not None:
        # Before minutes of work, not after them.
        make_folder(python_check)
    for line in fed_lines(fed) if verbose else note_lines(fed):
        say(line)
    own = frozenset() if tokenizer is None or ignore_stop else tokenizer.stop_ids
    report = run(
        checkpoint,
        preset(arithmetic),
        fed,
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
        stop_ids=own | stop_ids,
        sampling=sampling,
        write=_write if streams else _keep_quiet,
        digest=digest or python_check is not None,
    )
    if streams:
        _write(_last_line(report))
    for line in run_lines(report):
        say(line)
    checked = None
    if python_check is not None:
        checked = check_run(report)
        say(checked.line())
        for path in write_check(python_check, report, checked):
            say(f"written: {path}")
    return Outcome(report, checked)


def _tokenizer(checkpoint: Checkpoint, *, needed: bool) -> Tokenizer | None:
    """The file's tokenizer. Token ids run without one, so a file that embeds none is refused only for text."""
    vocabulary = checkpoint.vocabulary
    if not needed and (vocabulary is None or not vocabulary.tokens):
        return None
    return Tokenizer.from_checkpoint(checkpoint)


def _fed(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, text: str | None, tokens: list[int] | None, times: str
) -> Fed:
    if text is not None and tokenizer is not None:
        return fed_text(checkpoint, tokenizer, text, times)
    return fed_tokens(checkpoint, tokenizer, tokens or [])


def _write(part: str) -> None:
    sys.stdout.write(part)
    sys.stdout.flush()


def _keep_quiet(part: str) -> None:
    del part


def _last_line(report: RunReport) -> str:
    """What ends stdout: a line end where the text has none; without a tokenizer the ids."""
    if report.text is None:
        return ",".join(map(str, report.tokens)) + "\n"
    return "" if report.text.endswith("\n") else "\n"
