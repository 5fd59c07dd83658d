"""The two sides of a check, an APRT folder that nothing vouches for among them."""

from __future__ import annotations

from pathlib import Path

from aprjax.bisect.explain.identity_doubts import folder_tokens
from aprjax.bisect.open_sides import Opened, open_two
from aprjax.trace.aprt import SIDECAR, is_aprt_folder
from aprjax.trace.sides import open_side


def open_pair(model: str, ref: str) -> tuple[Opened, Opened]:
    """Opens both sides; a bare APRT folder, as upstream leaves it, is taken for one of the other side's file.

    Its tokens are those of its provenance, or those whose embedding rows it holds. Whether it is what it is taken for
    is what APRJAX-TRACE-001 asks.

    Raises:
        CheckpointError: a side cannot be read, or nothing says what a bare folder was fed.
    """
    texts = (model, ref)
    bare = [index for index, text in enumerate(texts) if _is_bare(text)]
    if len(bare) != 1:
        return open_two(model, ref)
    other = open_two(texts[1 - bare[0]], texts[1 - bare[0]])[0]
    if other.checkpoint is None:
        return open_two(model, ref)
    file, text = other.checkpoint, texts[bare[0]]
    tokens = folder_tokens(text, file)
    side = open_side(text, config=file.config, tokens=None if tokens is None else list(tokens))
    taken = Opened(side, file)
    return (other, taken) if bare[0] else (taken, other)


def _is_bare(text: str) -> bool:
    path = Path(text)
    return path.is_dir() and not (path / SIDECAR).is_file() and is_aprt_folder(path)
