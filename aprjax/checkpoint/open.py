"""`open_checkpoint`: which container a path holds, told by its content and never by its extension."""

from __future__ import annotations

from pathlib import Path

from aprjax.checkpoint.types import Checkpoint, CheckpointError

# Bytes at the start of files that are taken for checkpoints by mistake, and what to do about each.
_LOOKALIKES = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint is one)", "convert it to safetensors first"),
    (b"\x80\x02", "a Python pickle; it could run code and is never loaded", "convert it to safetensors first"),
    (b"\x80\x03", "a Python pickle; it could run code and is never loaded", "convert it to safetensors first"),
    (b"\x80\x04", "a Python pickle; it could run code and is never loaded", "convert it to safetensors first"),
    (b"\x80\x05", "a Python pickle; it could run code and is never loaded", "convert it to safetensors first"),
    (b"ggml", "a model file from before GGUF", "convert the model again with a current llama.cpp"),
    (b"ggjt", "a model file from before GGUF", "convert the model again with a current llama.cpp"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page, not a model", "the download answered with a page: check its address"),
    (b"<html", "a web page, not a model", "the download answered with a page: check its address"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
)
_HEAD_BYTES = 32


def open_checkpoint(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open a GGUF file, an APR file or a Hugging Face safetensors folder.

    Args:
        path: a file (any part of a split GGUF, or a `.safetensors` file of a folder), or the folder.
        verify: also check what takes a pass over the whole file: the CRC at the end of an APR file.

    Returns:
        The checkpoint: memory-mapped, nothing decoded, deviations as `.findings`.

    Raises:
        CheckpointError: no such file, not a checkpoint, another architecture, or damaged beyond reading.
    """
    path = Path(path)
    container = container_of(path)
    if container == "gguf":
        from aprjax.checkpoint.gguf_reader import read_gguf

        return read_gguf(path)
    if container == "apr":
        from aprjax.checkpoint.apr_reader import read_apr

        return read_apr(path, verify=verify)
    from aprjax.checkpoint.safetensors_reader import read_safetensors

    return read_safetensors(path)


def container_of(path: Path) -> str:
    """`"gguf"`, `"apr"` (anything with one of its magics: `read_apr` tells them apart) or `"safetensors"`.

    Raises:
        CheckpointError: none of them.
    """
    if path.is_dir():
        return "safetensors"
    from aprjax.checkpoint.mapped_file import map_file

    mapped = map_file(path)
    head = mapped[:_HEAD_BYTES].tobytes()
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"APR"):
        return "apr"
    # A safetensors file is a u64 header length, then JSON padded with spaces at the end only.
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= mapped.size - 8:
        return "safetensors"
    fix = "give a .gguf file, a .apr file or a Hugging Face safetensors folder"
    for magic, description, advice in _LOOKALIKES:
        if head.startswith(magic):
            raise CheckpointError(f"this is {description}", file=path, offset=0, fix=advice)
    raise CheckpointError(
        f"expected a GGUF, APR or safetensors file, found the first bytes {head[:8]!r}", file=path, offset=0, fix=fix
    )
