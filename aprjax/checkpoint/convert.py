"""From one container to another: GGUF, APR v2, Hugging Face safetensors, in any direction.

Tensors go over one piece at a time, so memory stays at some MiB beside the mapped source; the output
appears only when it is whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aprjax.checkpoint.conversion_policy import Dtype, Plan, plan_conversion
from aprjax.checkpoint.gguf_metadata import RECORD_KEY, GgufRecord, RecordError, build_metadata
from aprjax.checkpoint.gguf_writer import Progress, write_gguf
from aprjax.checkpoint.hf_tokenizer import NORMAL, UNUSED
from aprjax.checkpoint.names import gguf_to_hf, hf_to_gguf
from aprjax.checkpoint.open import open_checkpoint
from aprjax.checkpoint.safetensors_format import METADATA_KEY
from aprjax.checkpoint.types import Checkpoint, CheckpointError, FileFormat, Finding, Vocabulary

SOURCE_METADATA_KEY = "source_metadata"
# Top-level keys of an APR file that describe the model to people; they go over to another APR file.
_DESCRIPTIONS = ("name", "description", "author", "license", "data_source", "data_license", "source", "created_at")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: path of the source.
        target: path of the output.
        source_format: container of the source.
        target_format: container of the output.
        tensors: how many the output holds.
        nbytes: bytes of tensor data in the output.
        copied: how many tensors kept their bytes, by block type.
        decoded: how many were decoded and written as another type, by `"Q5_0 -> F32"`.
        head: what became of `lm_head.weight`: `"kept"`, `"synthesized"`, `"dropped"` or `"absent"` in both.
        notes: what the user should know, in sentences.
        findings: deviations of the source.
    """

    source: str
    target: str
    source_format: FileFormat
    target_format: FileFormat
    tensors: int
    nbytes: int
    copied: Mapping[str, int]
    decoded: Mapping[str, int]
    head: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {"schema": "aprjax.conversion/1", **asdict(self)}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    keep_blocks: bool = False,
    target_format: FileFormat | None = None,
    dtype: Dtype = "auto",
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint.

    Args:
        source: a GGUF or APR file, or a Hugging Face folder.
        target: the output. A file that stands there is replaced once the new one is whole; a folder must be empty.
        keep_blocks: see `conversion_policy`.
        target_format: the container to write; by default `.gguf` and `.apr` say so, anything else becomes a folder.
        dtype: of the weights of a safetensors folder.
        progress: called with the tensor bytes written so far and the total.

    Raises:
        CheckpointError: the source cannot be read or converted, the target is the source, or cannot be written.
    """
    source, target = Path(source), Path(target)
    container = target_format or format_of(target)
    checkpoint = open_checkpoint(source)
    _refuse_overwriting(checkpoint, target)
    plan = plan_conversion(checkpoint, container, keep_blocks=keep_blocks, dtype=dtype)
    if container == "gguf":
        _write_gguf(checkpoint, target, plan, progress)
    elif container == "apr":
        _write_apr(checkpoint, target, plan, progress)
    else:
        _write_safetensors(checkpoint, target, plan, progress)
    copied = Counter(tensor.block_type for tensor in plan.tensors if tensor.copied)
    decoded = Counter(
        f"{tensor.source.block_type} -> {tensor.block_type}" for tensor in plan.tensors if not tensor.copied
    )
    return ConversionReport(
        source=str(source),
        target=str(target),
        source_format=checkpoint.format,
        target_format=container,
        tensors=len(plan.tensors),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors),
        copied=dict(copied),
        decoded=dict(decoded),
        head=plan.head,
        notes=tuple(plan.notes),
        findings=checkpoint.findings,
    )


def format_of(target: Path) -> FileFormat:
    """The container that a path's extension asks for."""
    suffixes: dict[str, FileFormat] = {".gguf": "gguf", ".apr": "apr"}
    return suffixes.get(target.suffix.lower(), "safetensors")


def _refuse_overwriting(checkpoint: Checkpoint, target: Path) -> None:
    if not target.exists():
        return
    for path in (checkpoint.path, *checkpoint.files):
        if target.samefile(path):
            raise CheckpointError("the target is the source", file=target, fix="choose another name for the output")


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    """Texts that a container keeps for the one before it: GGUF's record, the `__metadata__` of safetensors files."""
    if checkpoint.format == "gguf":
        return {RECORD_KEY: GgufRecord.of(checkpoint).to_text()}
    key = SOURCE_METADATA_KEY if checkpoint.format == "apr" else METADATA_KEY
    kept = checkpoint.metadata.get(key)
    return {str(name): text for name, text in kept.items() if isinstance(text, str)} if isinstance(kept, dict) else {}


def _record(checkpoint: Checkpoint, plan: Plan) -> GgufRecord | None:
    text = _carried(checkpoint).get(RECORD_KEY)
    if text is None:
        return None
    try:
        return GgufRecord.from_text(text)
    except RecordError as error:
        plan.notes.append(f"the record of the GGUF file that the source came from cannot be read ({error}): left out")
        return None


def _write_gguf(checkpoint: Checkpoint, target: Path, plan: Plan, progress: Progress | None) -> None:
    if checkpoint.config.rope_pairing != "neox":
        raise CheckpointError(
            f"GGUF has no key for rope pairing {checkpoint.config.rope_pairing!r}; llama.cpp rotates Qwen2 as 'neox'",
            file=checkpoint.path,
            fix="correct rope_type in the source file (2 for Qwen2)",
        )
    record = _record(checkpoint, plan)
    # The file's own names and order; tensors that it did not have follow in execution order.
    stored = {gguf_to_hf(name): name for name, _ in record.tensors} if record else {}
    order = {name: position for position, name in enumerate(stored)}
    tensors = [
        replace(tensor, name=stored.get(tensor.name, hf_to_gguf(tensor.name)))
        for tensor in sorted(plan.tensors, key=lambda tensor: order.get(tensor.name, len(order)))
    ]
    metadata = build_metadata(
        checkpoint.config,
        _padded(checkpoint, plan),
        checkpoint.chat_template,
        block_types=[(tensor.name, tensor.block_type) for tensor in tensors],
        record=record,
        name=str(checkpoint.metadata.get("name") or checkpoint.path.stem),
    )
    write_gguf(target, metadata=metadata, tensors=tensors, progress=progress)


def _padded(checkpoint: Checkpoint, plan: Plan) -> Vocabulary | None:
    """The vocabulary with a token for every embedding row, which llama.cpp demands."""
    vocabulary, rows = checkpoint.vocabulary, checkpoint.config.vocab_size
    if vocabulary is None:
        plan.notes.append("the source holds no vocabulary: llama.cpp will not load the file")
        return None
    count = len(vocabulary.tokens)
    if count > rows:
        raise CheckpointError(
            f"{count} tokens for {rows} embedding rows: llama.cpp would refuse the file",
            file=checkpoint.path,
            fix="give the tokenizer that belongs to these weights",
        )
    if not vocabulary.token_types:
        plan.notes.append("the source holds no token types: llama.cpp will take special tokens for ordinary text")
    if count == rows:
        return vocabulary
    plan.notes.append(f"{rows - count} unused tokens [PAD…] were added, one for each embedding row without a token")
    padding = range(count, rows)
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *(f"[PAD{number}]" for number in padding)),
        token_types=(*(vocabulary.token_types or (NORMAL,) * count), *(UNUSED for _ in padding)),
    )


def _write_apr(checkpoint: Checkpoint, target: Path, plan: Plan, progress: Progress | None) -> None:
    from aprjax.checkpoint.apr_writer import write_apr

    total = sum(tensor.nbytes for tensor in plan.tensors)
    written = 0

    def advance(size: int) -> None:
        nonlocal written
        written += size
        if progress is not None:
            progress(written, total)

    write_apr(
        target,
        config=checkpoint.config,
        tensors=plan.tensors,
        vocabulary=checkpoint.vocabulary,
        chat_template=checkpoint.chat_template,
        extra_metadata=_descriptions(checkpoint),
        source_metadata=_carried(checkpoint),
        tied_embeddings=plan.head == "synthesized",
        original_format=checkpoint.format
        if checkpoint.format != "apr"
        else _text(checkpoint.metadata.get("original_format")),
        progress=advance,
    )


def _descriptions(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.format == "apr":
        stated = {key: _text(checkpoint.metadata.get(key)) for key in _DESCRIPTIONS}
    elif checkpoint.format == "gguf":
        stated = {key: _text(checkpoint.metadata.get(f"general.{key}")) for key in ("name", "author", "license")}
    else:
        stated = {}
    return {key: text for key, text in stated.items() if text is not None}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _write_safetensors(checkpoint: Checkpoint, target: Path, plan: Plan, progress: Progress | None) -> None:
    from aprjax.checkpoint.safetensors_writer import write_safetensors

    write_safetensors(
        target,
        config=checkpoint.config,
        tensors=plan.tensors,
        vocabulary=checkpoint.vocabulary,
        chat_template=checkpoint.chat_template,
        metadata=_carried(checkpoint),
        progress=progress,
    )
