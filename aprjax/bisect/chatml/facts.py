"""What two files say of each other without being run: weights, special tokens, token ids, stop tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aprjax.bisect.chatml.cells import PairFacts, Side, SideFacts
from aprjax.bisect.chatml.prompts import ChatPrompt
from aprjax.bisect.files import FilesReport
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor
from aprjax.text import Tokenizer
from aprjax.text.special_tokens import END_OF_GENERATION, FILL_IN_MIDDLE_END
from aprjax.text.tokenizer import TextError

_ROW_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
# Further ids at which GGUF metadata declares an answer to end.
_DECLARED = ("eot", "eom")


@dataclass(frozen=True)
class Texts:
    """Both sides' tokenizers; a side without one borrows the other's.

    Attributes:
        model: the model's.
        ref: the reference's.
        missing: sides that have none, and why.
    """

    model: Tokenizer
    ref: Tokenizer
    missing: Mapping[Side, str]

    def of(self, side: Side) -> Tokenizer:
        """One side's."""
        return self.model if side == "model" else self.ref


def open_texts(model: Checkpoint, ref: Checkpoint) -> Texts:
    """Both tokenizers.

    Raises:
        CheckpointError: neither file has one.
    """
    found: dict[Side, Tokenizer] = {}
    missing: dict[Side, str] = {}
    error: CheckpointError | None = None
    sides: tuple[tuple[Side, Checkpoint], ...] = (("ref", ref), ("model", model))
    for side, checkpoint in sides:
        try:
            found[side] = Tokenizer.from_checkpoint(checkpoint)
        except CheckpointError as raised:
            error = raised
            missing[side] = raised.message
    if not found:
        assert error is not None
        raise error
    return Texts(found.get("model") or found["ref"], found.get("ref") or found["model"], missing)


def decode_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of a continuation, special tokens written out; ids outside the vocabulary as `<id 151700>`."""
    try:
        return tokenizer.decode(tokens)
    except TextError:
        size = len(tokenizer)
        return "".join(tokenizer.decode([t]) if 0 <= t < size else f"<id {t}>" for t in tokens)


def side_facts(checkpoint: Checkpoint, tokenizer: Tokenizer, *, has_tokenizer: bool) -> SideFacts:
    """The file and its stop tokens."""
    vocabulary = tokenizer.vocabulary
    names = END_OF_GENERATION | FILL_IN_MIDDLE_END
    named = frozenset(index for index, token in enumerate(vocabulary.tokens) if token in names)
    # A default that the reader put in the place of an absent id is nothing that the file declares.
    assumed = any(finding.id == "apr-eos-absent" for finding in checkpoint.findings)
    eos = None if assumed else vocabulary.eos_token_id
    ids = [eos, *(checkpoint.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _DECLARED)]
    declared = frozenset(i for i in ids if isinstance(i, int) and 0 <= i < len(vocabulary.tokens))
    return SideFacts(
        path=str(checkpoint.path),
        sha256=checkpoint.sha256(),
        format=checkpoint.format,
        declared_stops=declared,
        named_stops=named,
        has_tokenizer=has_tokenizer,
    )


def pair_facts(
    model: Checkpoint,
    ref: Checkpoint,
    files: FilesReport,
    texts: Texts,
    *,
    prompts: Sequence[ChatPrompt],
    wraps: Sequence[str],
) -> PairFacts:
    """Which weights, ids and special tokens differ."""
    inert = all(finding.severity == "info" for finding in files.findings() if finding.id == "config-differs")
    rows = _differing_rows(model, ref, files)
    special = texts.ref.special_ids
    special_rows = sorted(row for row in rows if row in special)
    only_rows = inert and bool(rows) and set(rows) <= special and all(t.name in _ROW_TENSORS for t in files.tensors)
    ids_differ = frozenset(
        (prompt.name, wrap)
        for prompt in prompts
        for wrap in wraps
        if texts.model.encode(prompt.fed(wrap)) != texts.ref.encode(prompt.fed(wrap))
    )
    return PairFacts(
        identical_weights=inert and not files.tensors,
        special_rows=tuple(texts.ref.token(row) for row in special_rows),
        special_row_ids=frozenset(special_rows),
        only_special_rows=only_rows,
        head_differs=any(t.name == "lm_head.weight" for t in files.tensors) or _tied(model, ref),
        equal_values=inert and bool(files.tensors) and all(t.same_values for t in files.tensors),
        special_ids=_special_ids(texts),
        ids_differ=ids_differ,
        # Wrapping adds special tokens; text that is encoded alike without them is not what differs.
        only_special_ids=all(texts.model.encode(p.text) == texts.ref.encode(p.text) for p in prompts),
        files_sentence=files.sentence(),
    )


def _differing_rows(model: Checkpoint, ref: Checkpoint, files: FilesReport) -> list[int]:
    """Rows of embedding and head that the files do not hold in the same bytes; none where all of them differ."""
    found: set[int] = set()
    for name in _ROW_TENSORS:
        ours, theirs = model.tensors.get(name), ref.tensors.get(name)
        if files.same_bytes(name) or ours is None or theirs is None:
            continue
        rows = _unequal_rows(ours, theirs)
        if rows is None:
            return []
        found.update(rows)
    return sorted(found)


def _unequal_rows(ours: EncodedTensor, theirs: EncodedTensor) -> list[int] | None:
    if (ours.block_type, ours.shape, ours.row_padded) != (theirs.block_type, theirs.shape, theirs.row_padded):
        return None
    try:
        a, b = ours.packed(), theirs.packed()
    except CheckpointError:  # rows without whole blocks
        return None
    # Some rows at a time: the comparison would hold a boolean for every byte of the matrix.
    step = max(1, (1 << 24) // max(1, a[0].size))
    found: list[int] = []
    for start in range(0, len(a), step):
        unequal = (a[start : start + step] != b[start : start + step]).any(axis=(1, 2))
        found += (start + np.flatnonzero(unequal)).tolist()
    return found


def _tied(model: Checkpoint, ref: Checkpoint) -> bool:
    return any("lm_head.weight" not in side.tensors for side in (model, ref))


def _special_ids(texts: Texts) -> tuple[tuple[str, int | None, int | None], ...]:
    indexes = [{text: i for i, text in enumerate(t.vocabulary.tokens)} for t in (texts.model, texts.ref)]
    special = {t.vocabulary.tokens[i] for t in (texts.model, texts.ref) for i in t.special_ids}
    found = [(text, indexes[0].get(text), indexes[1].get(text)) for text in special if text]
    # In the order of the reference's ids, those it lacks last.
    return tuple(sorted((t for t in found if t[1] != t[2]), key=lambda t: (t[2] is None, t[2] or 0, t[0])))
