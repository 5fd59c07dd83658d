"""What all engines that are run live share: their error, and the check of the tokens they are fed."""

from __future__ import annotations

from aprjax.checkpoint.types import Checkpoint, CheckpointError


class EngineError(CheckpointError):
    """The engine cannot be run, or ran and failed."""


def check_tokens(checkpoint: Checkpoint, tokens: list[int]) -> None:
    """Checks that there are tokens, and that the model has a row for each.

    Raises:
        CheckpointError: there are none, or one lies outside the vocabulary.
    """
    size = checkpoint.config.vocab_size
    wrong = [token for token in tokens if not 0 <= token < size]
    if not tokens or wrong:
        raise CheckpointError(
            f"expected token ids from 0 to {size - 1}, found {wrong[0] if wrong else 'none'}",
            file=checkpoint.path,
            fix="give the ids of this model's own tokenizer",
        )
