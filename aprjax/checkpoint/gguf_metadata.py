"""GGUF's key-values from a model, and a record of a GGUF file's own that other containers carry along.

An APR file and a safetensors folder have homes for the dimensions, the vocabulary and the chat
template, but not for the rest of a GGUF file's metadata, for the types it was written in or for its
order. `GgufRecord` is that rest, as one JSON text: the way back to GGUF restores it. What has a home
is not in the record, so whoever edits `rope_theta` in the APR file finds the edit in the GGUF file.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprjax.checkpoint.config_rules import DEFAULT_ROPE_THETA
from aprjax.checkpoint.gguf_format import ARRAY, DEFAULT_ALIGNMENT, TYPE_NUMBERS, GgufMetadata
from aprjax.checkpoint.gguf_reader import ARCHITECTURE_KEY, CHAT_TEMPLATE_KEY, CONFIG_KEYS, VOCABULARY_KEYS
from aprjax.checkpoint.types import Checkpoint, ModelConfig, Vocabulary

# The key under which containers keep the record: in `source_metadata` of an APR file, in
# `__metadata__` of a safetensors file. Both are maps from strings to strings.
RECORD_KEY = "gguf"
# Types that llama.cpp's converter writes for the keys that the model determines.
_CONFIG_TYPES = {"rope_theta": "FLOAT32", "rms_norm_eps": "FLOAT32"}
_VOCABULARY_TYPES = {
    "tokens": "ARRAY[STRING]",
    "merges": "ARRAY[STRING]",
    "token_types": "ARRAY[INT32]",
    "bos_token_id": "UINT32",
    "eos_token_id": "UINT32",
    "padding_token_id": "UINT32",
    "add_bos": "BOOL",
    "pre_tokenizer": "STRING",
    "model": "STRING",
}
# Keys that the model only writes when the source file had them: engines derive them otherwise.
_OPTIONAL_CONFIG = ("vocab_size", "head_dim")
# Number of `general.file_type` by the most frequent matrix type (llama.h `enum llama_ftype`).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
_NO_FILE_TYPE = 1024  # LLAMA_FTYPE_GUESSED
# Version of the block encodings (ggml.h GGML_QNT_VERSION).
_QUANTIZATION_VERSION = 2
_SPLIT_PREFIX = "split."
# A page of memory: no file is aligned to more, and padding must not fill the disk.
_MAX_ALIGNMENT = 1 << 16


class RecordError(ValueError):
    """A record that is not one; whoever met it says where."""


@dataclass(frozen=True)
class GgufRecord:
    """What only a GGUF file holds: order, types, keys without a home, alignment, tensor order.

    Attributes:
        entries: `(key, type, value)` in the order of the file; the value is None where the model determines it.
        tensors: `(stored name, block type)` in the order of the file.
    """

    entries: tuple[tuple[str, str, Any], ...]
    tensors: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> GgufRecord:
        """The record of an opened GGUF file."""
        metadata = checkpoint.metadata
        if not isinstance(metadata, GgufMetadata):
            raise RecordError("only a GGUF file has such metadata")
        determined = _determined_keys(checkpoint.config.architecture)
        entries = tuple(
            (key, metadata.types[key], None if key in determined and not _repeated(key, value, determined) else value)
            for key, value in metadata.items()
            if not key.startswith(_SPLIT_PREFIX)
        )
        tensors = tuple((tensor.stored_name, tensor.block_type) for tensor in checkpoint.tensors.values())
        return cls(entries, tensors)

    @property
    def alignment(self) -> int:
        """Of the tensor data."""
        return next((value for key, _, value in self.entries if key == "general.alignment"), DEFAULT_ALIGNMENT)

    def to_text(self) -> str:
        """Compact JSON of plain ASCII."""
        content = {
            "metadata": [[key, spelled, _to_json(value)] for key, spelled, value in self.entries],
            "tensors": self.tensors,
        }
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_text(cls, text: Any) -> GgufRecord:
        """The inverse of `to_text`.

        Raises:
            RecordError: the text is not such JSON.
        """
        try:
            content = json.loads(text)
            entries = tuple((str(key), str(spelled), _from_json(value)) for key, spelled, value in content["metadata"])
            tensors = tuple((str(name), str(block_type)) for name, block_type in content["tensors"])
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise RecordError(f"{type(error).__name__}: {error}") from error
        known = {*TYPE_NUMBERS, *(f"{ARRAY}[{name}]" for name in TYPE_NUMBERS if name != ARRAY)} - {ARRAY}
        if unknown := {spelled for _, spelled, _ in entries} - known:
            raise RecordError(f"unknown type {min(unknown)!r}")
        record = cls(entries, tensors)
        alignment = record.alignment
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise RecordError(f"alignment {alignment!r} is no power of two up to {_MAX_ALIGNMENT}")
        return record


def build_metadata(
    config: ModelConfig,
    vocabulary: Vocabulary | None,
    chat_template: str | None,
    *,
    block_types: Sequence[tuple[str, str]],
    record: GgufRecord | None,
    name: str = "",
) -> GgufMetadata:
    """The key-values of a GGUF file that holds this model.

    Args:
        config: dimensions and constants.
        vocabulary: tokens, merges and ids; None leaves them out.
        chat_template: the template's text.
        block_types: `(GGUF name, block type)` of every tensor that will be written.
        record: of the GGUF file that the model came from, if it did.
        name: `general.name` where there is no record.
    """
    arch = config.architecture
    values: dict[str, tuple[str, Any]] = {}
    if record is None:
        values[ARCHITECTURE_KEY] = ("STRING", arch)
        values["general.type"] = ("STRING", "model")
        if name:
            values["general.name"] = ("STRING", name)
    else:
        values.update({key: (spelled, value) for key, spelled, value in record.entries})
    # What readers take for a key that is absent, so that a file without it is given back without it.
    defaults = {
        f"{arch}.{CONFIG_KEYS['rope_theta']}": DEFAULT_ROPE_THETA,
        f"{arch}.{CONFIG_KEYS['num_kv_heads']}": config.num_heads,
    }
    for key, (spelled, value, optional) in _model_values(config, vocabulary, chat_template).items():
        if key in values:
            spelled, stored = values[key]  # noqa: PLW2901 - the file's own type wins over the usual one
            if spelled.startswith(ARRAY) and not isinstance(value, tuple):
                # One number for each layer: keep the file's array unless the number was edited.
                value = (value,) * len(stored or (value,) * config.num_layers)  # noqa: PLW2901 - spelled per layer
            values[key] = (spelled, value)
        elif not optional and (record is None or value != defaults.get(key)):
            values[key] = (spelled, value)
    for key in [key for key, (_, value) in values.items() if value is None]:
        # The record names a key of the model that the model has lost since.
        del values[key]
    if record is None or list(record.tensors) != list(block_types):
        spelled, old = values.get("general.file_type", ("UINT32", None))
        values["general.file_type"] = (spelled, _file_type(block_types, record, old))
        if any(block_type not in ("F32", "F16", "BF16") for _, block_type in block_types):
            values.setdefault("general.quantization_version", ("UINT32", _QUANTIZATION_VERSION))
    alignment = record.alignment if record else DEFAULT_ALIGNMENT
    return GgufMetadata(
        {key: value for key, (_, value) in values.items()},
        {key: spelled for key, (spelled, _) in values.items()},
        alignment,
    )


def _model_values(
    config: ModelConfig, vocabulary: Vocabulary | None, chat_template: str | None
) -> Mapping[str, tuple[str, Any, bool]]:
    """Type, value, and whether the key is left out unless the source had it, for all that the model determines."""
    values: dict[str, tuple[str, Any, bool]] = {ARCHITECTURE_KEY: ("STRING", config.architecture, False)}
    for field, key in CONFIG_KEYS.items():
        optional = field in _OPTIONAL_CONFIG
        if field == "head_dim" and config.head_dim * config.num_heads != config.hidden_size:
            # llama.cpp would derive another width; `value_length` must then be stated as well.
            values[f"{config.architecture}.attention.value_length"] = ("UINT32", config.head_dim, False)
            optional = False
        spelled = _CONFIG_TYPES.get(field, "UINT32")
        values[f"{config.architecture}.{key}"] = (spelled, getattr(config, field), optional)
    if vocabulary is not None:
        for field, key in VOCABULARY_KEYS.items():
            value = getattr(vocabulary, field)
            if value is not None and value != ():
                values[f"tokenizer.ggml.{key}"] = (_VOCABULARY_TYPES[field], value, False)
    if chat_template is not None:
        values[CHAT_TEMPLATE_KEY] = ("STRING", chat_template, False)
    return values


def _determined_keys(architecture: str) -> set[str]:
    return {
        ARCHITECTURE_KEY,
        *(f"{architecture}.{key}" for key in CONFIG_KEYS.values()),
        *(f"tokenizer.ggml.{key}" for key in VOCABULARY_KEYS.values()),
        CHAT_TEMPLATE_KEY,
    }


def _repeated(key: str, value: Any, determined: set[str]) -> bool:
    """Whether the value is an array where the model has one number."""
    return isinstance(value, tuple) and key in determined and not key.startswith("tokenizer.")


def _file_type(block_types: Sequence[tuple[str, str]], record: GgufRecord | None, old: Any) -> int:
    if record is not None and old is not None and dict(record.tensors) == dict(block_types):
        return old
    # Norms and biases are always F32, so the matrices decide.
    matrices = Counter(block_type for name, block_type in block_types if not name.endswith((".bias", "norm.weight")))
    return _FILE_TYPES.get(matrices.most_common(1)[0][0], _NO_FILE_TYPE) if matrices else _FILE_TYPES["F32"]


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return {"bytes": base64.b64encode(value.encode(errors="surrogateescape")).decode()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        if set(value) == {"bytes"}:
            return base64.b64decode(value["bytes"]).decode(errors="surrogateescape")
        raise ValueError(f"unexpected object {str(value)[:60]}")
    return value
