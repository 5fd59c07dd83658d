"""Hugging Face folders (`config.json`, `*.safetensors`, `tokenizer.json`) as a `Checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.hf_config import parse_hf_config
from aprjax.checkpoint.hf_tokenizer import read_chat_template, read_vocabulary
from aprjax.checkpoint.json_file import read_json
from aprjax.checkpoint.safetensors_format import METADATA_KEY, SafetensorsFile, read_safetensors_file
from aprjax.checkpoint.structure import overlap_findings, structure_findings, vocabulary_findings
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor, Finding

INDEX_NAME = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_safetensors(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, or the folder of a `.safetensors` file.

    Args:
        path: the folder, or one of its `.safetensors` files (then of that file only, unless an index lists it).

    Returns:
        The checkpoint. `.metadata` holds the JSON files by stem (`"config"`, `"generation_config"`,
        `"tokenizer_config"`) and the files' own `"__metadata__"`.

    Raises:
        CheckpointError: a file is missing, damaged or of another architecture.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            "expected a config.json beside the weights",
            file=folder,
            fix="give the folder of a Hugging Face model, with config.json and *.safetensors",
        )
    content = read_json(config_path)
    config, findings = parse_hf_config(content, config_path)
    files, index_findings = _weight_files(path, folder)
    findings += index_findings
    tensors: dict[str, EncodedTensor] = {}
    container: dict[str, str] = {}
    for file in files:
        findings += file.findings
        container |= file.metadata
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"also in {Path(tensors[name].file).name}",
                    file=file.path,
                    tensor=name,
                    offset=tensor.offset,
                    fix="remove the file that does not belong to the model",
                )
            tensors[name] = tensor
    findings += _settle_head(content, config_path, tensors)
    metadata: dict[str, Any] = {"config": content, METADATA_KEY: container}
    for stem in ("generation_config", "tokenizer_config"):
        if (folder / f"{stem}.json").is_file():
            metadata[stem] = read_json(folder / f"{stem}.json")
    tokenizer_config = metadata.get("tokenizer_config", {})
    vocabulary, vocabulary_notes = read_vocabulary(
        folder, metadata.get("generation_config", {}) | content, tokenizer_config
    )
    return Checkpoint(
        path=path,
        format="safetensors",
        config=config,
        tensors=tensors,
        vocabulary=vocabulary,
        chat_template=read_chat_template(folder, tokenizer_config),
        metadata=metadata,
        findings=(
            *findings,
            *overlap_findings(tensors.values()),
            *structure_findings(config, tensors),
            *vocabulary_notes,
            *vocabulary_findings(config, vocabulary),
        ),
        files=tuple(file.path for file in files),
    )


def _weight_files(path: Path, folder: Path) -> tuple[list[SafetensorsFile], list[Finding]]:
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("expected a weight_map", file=index, fix="download the index again")
        stated = list(weight_map.values())
        # A name with a folder in it could reach any file of the machine.
        strange = [
            name for name in stated if not isinstance(name, str) or Path(name).name != name or name.startswith(".")
        ]
        if strange:
            raise CheckpointError(
                f"{str(strange[0])[:80]!r} is no name of a file beside it", file=index, fix="download the index again"
            )
        names = set(stated)
        if path.is_dir() or path.name in names:
            missing = sorted(name for name in names if not (folder / name).is_file())
            if missing:
                shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                raise CheckpointError(f"missing weight files: {shown}", file=index, fix="download them beside it")
            files = [read_safetensors_file(folder / name) for name in sorted(names)]
            return files, _index_findings(weight_map, files)
    if path.is_file():
        return [read_safetensors_file(path)], []
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return [read_safetensors_file(found[0])], []
    if found:
        raise CheckpointError(
            f"{len(found)} .safetensors files but no {INDEX_NAME}",
            file=folder,
            fix="download the index, or give the one file to read",
        )
    pickles = next((name.name for pattern in ("*.bin", "*.pt", "*.pth") for name in folder.glob(pattern)), None)
    detail = f", only {pickles}, a pickle, which could run code and is never loaded" if pickles else ""
    raise CheckpointError(
        f"expected *.safetensors files, found none{detail}", file=folder, fix="download the safetensors weights"
    )


def _index_findings(weight_map: dict[str, str], files: list[SafetensorsFile]) -> list[Finding]:
    where = {name: file.path.name for file in files for name in file.tensors}
    wrong = [name for name, stated in weight_map.items() if where.get(name) != stated]
    unlisted = [name for name in where if name not in weight_map]
    findings = []
    if wrong:
        message = f"{INDEX_NAME} places {len(wrong)} tensors where they are not, first {wrong[0][:80]!r}"
        findings.append(Finding("safetensors-index-mismatch", "warning", message, tensor=wrong[0]))
    if unlisted:
        message = (
            f"{INDEX_NAME} leaves out {len(unlisted)} tensors, first {unlisted[0][:80]!r}; transformers skips them"
        )
        findings.append(Finding("safetensors-index-mismatch", "warning", message, tensor=unlisted[0]))
    return findings


def _settle_head(content: dict[str, Any], file: Path, tensors: dict[str, EncodedTensor]) -> list[Finding]:
    """Make the head what transformers makes of it: the embedding whenever `tie_word_embeddings` is true."""
    # Qwen2Config's own default.
    tied = bool(content.get("tie_word_embeddings", False))
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if not tied and head is None:
        message = "there is no lm_head.weight, but config.json does not tie it to the embedding"
        return [Finding("missing-tensor", "error", message, tensor=HEAD)]
    if tied and head is not None:
        del tensors[HEAD]
        same = embedding is not None and np.array_equal(head.data, embedding.data)
        message = "config.json ties the head to the embedding, so lm_head.weight of the file is not used; it holds " + (
            "the same bytes" if same else "other values"
        )
        return [Finding("tied-head-ignored", "info" if same else "warning", message, tensor=HEAD)]
    return []
