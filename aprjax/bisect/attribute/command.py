"""What `python -m bisect attribute` does: open, tokenize, run engines, attribute, write the report folder."""

from __future__ import annotations

from pathlib import Path

from aprjax.bisect.asked_pair import Question, asked_pair, open_sides_of
from aprjax.bisect.attribute.metric import Kind
from aprjax.bisect.attribute.plot import write_waterfall
from aprjax.bisect.attribute.report import AttributeReport
from aprjax.bisect.attribute.run import attribute
from aprjax.bisect.open_sides import SideLike
from aprjax.bisect.page import write_report as write_folder


def attribute_sides(
    model: SideLike,
    ref: SideLike,
    question: Question,
    *,
    kind: Kind = "margin",
    steps: int = 8,
    verify: int = 5,
    base: str = "float32",
) -> AttributeReport:
    """Attributes on one prompt (unasked, the first probe).

    Raises:
        CheckpointError: a side cannot be read or run.
    """
    with asked_pair(open_sides_of(model, ref), question) as pair:
        return attribute(
            pair.model,
            pair.ref,
            tokens=pair.tokens,
            positions=pair.positions,
            files=pair.files,
            kind=kind,
            steps=steps,
            verify=verify,
            dtype=base,
            progress=pair.progress,
        )


def write_report(report: AttributeReport, folder: Path) -> Path:
    """Writes `index.html`, `attribute.json` and `waterfall.png` into `folder`; returns the page's path.

    Raises:
        CheckpointError: the folder cannot be made.
        OSError: it cannot be written to.
    """
    page = write_folder(report.to_json(), folder)
    write_waterfall(report, folder / "waterfall.png")
    return page
