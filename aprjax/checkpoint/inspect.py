"""What a file holds, as one value that prints and goes into JSON."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprjax.checkpoint.finite import finite_findings
from aprjax.checkpoint.open import container_of, open_checkpoint
from aprjax.checkpoint.types import (
    Checkpoint,
    CheckpointError,
    EncodedTensor,
    FileFormat,
    Finding,
    ModelConfig,
    Vocabulary,
    file_sha256,
)

# Longest text or list of the metadata that is shown; longer ones are described.
_SHOWN_CHARACTERS = 200
_SHOWN_ELEMENTS = 8


@dataclass(frozen=True)
class TensorFacts:
    """One tensor as it lies in its file."""

    name: str
    stored_name: str
    shape: tuple[int, ...]
    block_type: str
    nbytes: int
    offset: int
    file: str


@dataclass(frozen=True)
class BlockTypeFacts:
    """All tensors of one block type together."""

    block_type: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class VocabularyFacts:
    """Counts and special ids; `digest` is a SHA-256 over tokens and merges, to compare files by."""

    tokens: int
    merges: int
    token_types: dict[str, int]
    bos_token_id: int | None
    eos_token_id: int | None
    padding_token_id: int | None
    add_bos: bool | None
    pre_tokenizer: str | None
    model: str | None
    digest: str


@dataclass(frozen=True)
class Inspection:
    """Everything `python -m aprjax inspect FILE` shows.

    Attributes:
        path: as given.
        format: the container.
        files: the files, with their sizes in bytes.
        sha256: of the file (see `Checkpoint.sha256`), or None if it was not asked for.
        config: the model's dimensions; None for a GGUF file of another architecture.
        tensors: in the order of the file.
        block_types: most bytes first.
        elements: how many weights there are.
        tied_head: whether the head is the embedding; None where there is no embedding.
        vocabulary: None where the file has none.
        chat_template_characters: length of the template; None where there is none.
        metadata: the container's own keys, long values described instead of shown.
        findings: every deviation.
    """

    path: str
    format: FileFormat
    files: dict[str, int]
    sha256: str | None
    config: ModelConfig | None
    tensors: tuple[TensorFacts, ...]
    block_types: tuple[BlockTypeFacts, ...]
    elements: int
    tied_head: bool | None
    vocabulary: VocabularyFacts | None
    chat_template_characters: int | None
    metadata: dict[str, Any]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {"schema": "aprjax.inspection/1", **asdict(self)}


def inspect(path: str | Path, *, whole: bool = True, values: bool = False) -> Inspection:
    """Look at a checkpoint.

    Args:
        path: a file or folder that `open_checkpoint` reads, or a GGUF file of any architecture.
        whole: also read every byte, without decoding: for the SHA-256, an APR file's closing CRC, and for NaN or
            infinite weights.
        values: also decode every tensor, which takes a while, to find values that no sound model has
            (`values.scan_values`).

    Raises:
        CheckpointError: it cannot be read.
    """
    path = Path(path)
    try:
        checkpoint = open_checkpoint(path, verify=whole)
    except CheckpointError as error:
        foreign = _foreign_gguf(path, error, whole=whole)
        if foreign is None:
            raise
        return foreign
    scanned: tuple[Finding, ...] = ()
    if values:
        from aprjax.checkpoint.values import scan_values

        scanned = scan_values(checkpoint)
    return _inspection(
        path=path,
        container=checkpoint.format,
        files=checkpoint.files or (path,),
        sha256=checkpoint.sha256() if whole else None,
        config=checkpoint.config,
        tensors=checkpoint.tensors,
        tied_head=_tied(checkpoint),
        vocabulary=checkpoint.vocabulary,
        chat_template=checkpoint.chat_template,
        metadata=checkpoint.metadata,
        findings=(*checkpoint.findings, *scanned),
        look_for_nonfinite=whole and not values,
    )


def _foreign_gguf(path: Path, error: CheckpointError, *, whole: bool) -> Inspection | None:
    """A sound GGUF file whose model is no Qwen2: its tensors can still be listed."""
    from aprjax.checkpoint.gguf_reader import UnsupportedArchitecture, read_gguf_file

    if not isinstance(error, UnsupportedArchitecture) or container_of(path) != "gguf":
        return None
    gguf = read_gguf_file(path)
    return _inspection(
        path=path,
        container="gguf",
        files=gguf.parts,
        sha256=file_sha256(path) if whole and len(gguf.parts) == 1 else None,
        config=None,
        tensors=gguf.tensors,
        tied_head=None,
        vocabulary=None,
        chat_template=None,
        metadata=gguf.header.metadata,
        findings=(*gguf.findings, Finding("architecture-unsupported", "error", error.message)),
        look_for_nonfinite=whole,
    )


def _inspection(
    *,
    path: Path,
    container: FileFormat,
    files: tuple[Path, ...],
    sha256: str | None,
    config: ModelConfig | None,
    tensors: Mapping[str, EncodedTensor],
    tied_head: bool | None,
    vocabulary: Vocabulary | None,
    chat_template: str | None,
    metadata: Mapping[str, Any],
    findings: tuple[Finding, ...],
    look_for_nonfinite: bool,
) -> Inspection:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.block_type] += 1
        sizes[tensor.block_type] += tensor.nbytes
    nonfinite = finite_findings(tensors.values()) if look_for_nonfinite else []
    return Inspection(
        path=str(path),
        format=container,
        files={str(file): file.stat().st_size for file in files},
        sha256=sha256,
        config=config,
        tensors=tuple(
            TensorFacts(
                name=tensor.name,
                stored_name=tensor.stored_name,
                shape=tensor.shape,
                block_type=tensor.block_type,
                nbytes=tensor.nbytes,
                offset=tensor.offset,
                file=Path(tensor.file).name,
            )
            for tensor in tensors.values()
        ),
        block_types=tuple(BlockTypeFacts(name, counts[name], size) for name, size in sizes.most_common()),
        elements=sum(tensor.size for tensor in tensors.values()),
        tied_head=tied_head,
        vocabulary=None if vocabulary is None else _vocabulary_facts(vocabulary),
        chat_template_characters=None if chat_template is None else len(chat_template),
        metadata={printable(str(key)): _summary(value) for key, value in metadata.items()},
        findings=(*findings, *nonfinite),
    )


def _tied(checkpoint: Checkpoint) -> bool | None:
    return checkpoint.tied_head() if "model.embed_tokens.weight" in checkpoint.tensors else None


def _vocabulary_facts(vocabulary: Vocabulary) -> VocabularyFacts:
    digest = hashlib.sha256()
    for texts in (vocabulary.tokens, vocabulary.merges):
        # Zero bytes separate and count the texts, so that moving a character from one to the next shows.
        digest.update(f"{len(texts)}\0".encode())
        digest.update("\0".join(texts).encode(errors="surrogatepass"))
    names = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}
    types = Counter(names.get(kind, str(kind)) for kind in vocabulary.token_types)
    return VocabularyFacts(
        tokens=len(vocabulary.tokens),
        merges=len(vocabulary.merges),
        token_types=dict(types),
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        padding_token_id=vocabulary.padding_token_id,
        add_bos=vocabulary.add_bos,
        pre_tokenizer=vocabulary.pre_tokenizer,
        model=vocabulary.model,
        digest=digest.hexdigest(),
    )


def printable(text: str) -> str:
    """Text that any terminal and any JSON reader can take: no control characters, no lone surrogates."""
    sound = text.encode(errors="backslashreplace").decode()
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in sound
    )


def _summary(value: Any, depth: int = 0) -> Any:
    """A metadata value as plain JSON, shortened."""
    if isinstance(value, str):
        text = printable(value[:_SHOWN_CHARACTERS])
        return text if len(value) <= _SHOWN_CHARACTERS else f"{text}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        if len(value) > _SHOWN_ELEMENTS or depth > 1:
            return f"({len(value)} elements)"
        return [_summary(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if depth > 1 or (depth and len(value) > 4 * _SHOWN_ELEMENTS):
            return f"({len(value)} keys)"
        return {printable(str(key)): _summary(item, depth + 1) for key, item in value.items()}
    return value
