"""What `python -m bisect attribute` does: open, tokenize, run engines, attribute, write the report folder."""

from __future__ import annotations

import json
from pathlib import Path

from aprjax.bisect.asked_pair import Question, asked_pair, open_sides_of
from aprjax.bisect.attribute.metric import Kind
from aprjax.bisect.attribute.render import write_waterfall
from aprjax.bisect.attribute.report import AttributeReport
from aprjax.bisect.attribute.run import attribute
from aprjax.checkpoint.atomic import atomic_file


def attribute_sides(
    model: str,
    ref: str,
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


def write_report(report: AttributeReport, folder: Path) -> None:
    """`attribute.json` and `waterfall.png`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "attribute.json") as stream:
        stream.write((json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n").encode())
    write_waterfall(report, folder / "waterfall.png")
