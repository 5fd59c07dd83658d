"""What `python -m bisect locate` does: open, tokenize, locate."""

from __future__ import annotations

from aprjax.bisect.asked_pair import Question, asked_pair, open_sides_of
from aprjax.bisect.locate.report import LocateReport
from aprjax.bisect.locate.run import locate
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.open_sides import SideLike
from aprjax.checkpoint.types import CheckpointError


def locate_sides(model: SideLike, ref: SideLike, question: Question) -> LocateReport:
    """Locates on one prompt (unasked, the first probe).

    Raises:
        CheckpointError: a side cannot be read or run, or the model's side is a recorded trace or an engine.
    """
    sides = open_sides_of(model, ref)
    if not sides[0].runs_here:
        raise CheckpointError(
            "the model's side has to be run with values put in, and this one is a trace or another engine",
            file=sides[0].side.path,
            fix="give the trace or engine as --ref, and a checkpoint as --model",
        )
    with asked_pair(sides, question) as pair:
        assert isinstance(pair.model, Runner)
        return locate(
            pair.model,
            pair.ref,
            tokens=pair.tokens,
            positions=pair.positions,
            files=pair.files,
            progress=pair.progress,
        )
