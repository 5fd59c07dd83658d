"""APR v2 files as `Checkpoint`s: memory-mapped, lazy, lenient. Every deviation becomes a `Finding`.

What cannot be read without guessing is refused: another container, a column-major or encrypted file, damaged metadata
or index, truncated tensors, bytes that fit no block type. All else is read as the file most plausibly means it, and
said.
"""

from __future__ import annotations

from pathlib import Path

from aprjax.checkpoint.apr_checks import check_model
from aprjax.checkpoint.apr_config import read_config
from aprjax.checkpoint.apr_container import read_container
from aprjax.checkpoint.apr_tensors import encode_tensors, name_entries, stored_shapes
from aprjax.checkpoint.apr_vocabulary import read_chat_template, read_vocabulary
from aprjax.checkpoint.structure import vocabulary_findings
from aprjax.checkpoint.types import Checkpoint, CheckpointError


def read_apr(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open an APR v2 file.

    Args:
        path: the file.
        verify: also compare the CRC-32 at its end, which reads the whole file. Opening leaves it out, as every
            real tool does (apr-format.md 1.3).

    Raises:
        CheckpointError: the file is no APR v2 language model, or damaged so that reading on would mean guessing.
    """
    path = Path(path)
    container = read_container(path, verify=verify)
    log, metadata, at = container.log, container.metadata, container.header.metadata_offset
    named = name_entries(container)
    try:
        config = read_config(path, metadata, stored_shapes(named), at, log)
    except CheckpointError as error:
        notes = "; ".join(finding.message for finding in log.all() if finding.severity == "error")
        if not notes:
            raise
        raise CheckpointError(
            f"{error.message}. The file also has: {notes[:500]}", file=path, offset=error.offset, fix=error.fix
        ) from None
    tensors = encode_tensors(container, named, config)
    vocabulary = read_vocabulary(metadata, at, log)
    template = read_chat_template(metadata, at, log)
    check_model(config, tensors, metadata, log)
    # Absence of the vocabulary was reported with what the real tools make of it.
    generic = vocabulary_findings(config, vocabulary) if vocabulary is not None else []
    return Checkpoint(
        path=path,
        format="apr",
        config=config,
        tensors=tensors,
        vocabulary=vocabulary,
        chat_template=template,
        metadata=metadata,
        findings=(*log.all(), *generic),
        files=(path,),
    )
