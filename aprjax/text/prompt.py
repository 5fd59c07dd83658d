"""From what a user gives as a prompt to token ids, with errors that say what was wrong with it."""

from __future__ import annotations

from pathlib import Path

from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.text.template import wrap
from aprjax.text.tokenizer import Tokenizer


def read_prompt_file(path: Path) -> str:
    """The text of a prompt file.

    Raises:
        CheckpointError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"the prompt is not UTF-8: {error}", file=path, offset=error.start, fix="save it as UTF-8"
        ) from None


def encode_prompt(checkpoint: Checkpoint, text: str, times: str) -> list[int]:
    """The ids of a prompt after wrapping, by the checkpoint's own tokenizer.

    Raises:
        CheckpointError: the checkpoint has no vocabulary, or the prompt has no tokens.
    """
    ids = Tokenizer.from_checkpoint(checkpoint).encode(wrap(text, times))
    if not ids:
        raise CheckpointError("the prompt has no tokens", file=checkpoint.path, fix="give a prompt that is not empty")
    return ids
