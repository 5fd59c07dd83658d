"""The JSON metadata of an APR v2 file: parsing, spellings, types (apr-format.md 2.1 to 2.3).

realizar parses the metadata into a typed structure and drops *all* of them when that fails: a key together with its
alias, or a number of the wrong type, costs the tokenizer and the architecture ("poison"). aprender reads the same
file without complaint. What is reported here is what tells those two apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aprjax.checkpoint.apr_findings import FindingLog, listing
from aprjax.checkpoint.types import CheckpointError

# Canonical key -> other spellings that aprender and realizar accept (apr-format.md 2.2).
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_dim", "d_model", "n_embd"),
    "num_layers": ("n_layers", "num_hidden_layers", "n_layer"),
    "num_heads": ("n_heads", "num_attention_heads", "n_head"),
    "num_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "vocab_size": ("n_vocab",),
    "intermediate_size": ("ffn_dim", "intermediate_dim", "n_inner"),
    "max_position_embeddings": ("max_seq_len", "context_length", "n_ctx"),
    "rms_norm_eps": ("layer_norm_eps", "norm_eps"),
    "rope_theta": (),
    "rope_type": (),
    "head_dim": (),
    "architecture": (),
}
# Only realizar's own side formats write these (containers F and G, apr-format.md 1.7); no typed parse knows them.
SIDE_SPELLINGS: dict[str, str] = {"eps": "rms_norm_eps"}

INTEGER_KEYS = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "intermediate_size"),
    *("max_position_embeddings", "rope_type", "head_dim"),
)
FLOAT_KEYS = ("rope_theta", "rms_norm_eps")
# Other typed keys of the metadata structure: a value of another type poisons realizar's parse as well.
STRING_KEYS = (
    *("model_type", "name", "description", "author", "license", "data_source", "data_license", "version", "source"),
    *(
        "original_format",
        "created_at",
        "chat_template",
        "chat_format",
        "architecture",
        "hf_architecture",
        "hf_model_type",
    ),
)
OTHER_INTEGER_KEYS = ("total_size", "param_count", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
OBJECT_KEYS = ("sharding", "special_tokens")
# Written as null by every writer (apr-format.md 2.1).
ALWAYS_WRITTEN = ("license", "data_source", "data_license")

_POISON = (
    "aprender reads the file; realizar's typed parse fails and it loses all metadata (no tokenizer, 'C-01 missing "
    "architecture')"
)
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FIX = "the metadata section is damaged; re-convert the model"


@dataclass(frozen=True)
class Field:
    """One canonical key as found: its value, and the spelling that it came from."""

    value: Any
    spelling: str


def parse_metadata(raw: bytes, offset: int, log: FindingLog) -> dict[str, Any]:
    """The JSON object of the metadata section.

    Args:
        raw: the section's bytes.
        offset: of the section in the file, for messages.
        log: where findings go.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, or text that cannot be encoded again.
    """
    stripped = raw.rstrip(b"\0")
    if len(stripped) < len(raw):
        log.add(
            "apr-metadata-padding",
            "warning",
            f"the metadata size counts {len(raw) - len(stripped)} bytes of zero padding. JSON parsers refuse them: "
            "aprender refuses the file, realizar goes on without metadata",
            offset=offset + len(stripped),
        )
    duplicates: list[str] = []
    constants: list[str] = []

    def keep_last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicates.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return result

    def constant(text: str) -> float:
        constants.append(text)
        return float(text)

    try:
        metadata = json.loads(stripped.decode(), object_pairs_hook=keep_last, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"the metadata are not UTF-8: {error.reason}", offset=offset + error.start, fix=_FIX
        ) from None
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode())
        raise CheckpointError(
            f"the metadata are not JSON: {error.msg}. aprender refuses the file; realizar goes on without any metadata",
            offset=offset + at,
            fix=_FIX,
        ) from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"the metadata cannot be parsed: {error}", offset=offset, fix=_FIX) from None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"the metadata must be a JSON object, found {type(metadata).__name__}", offset=offset, fix=_FIX
        )
    if _LONE_SURROGATE.search(stripped):
        _check_encodable(metadata, offset)
    if duplicates:
        log.add(
            "apr-metadata-duplicate-key",
            "warning",
            f"keys that occur more than once: {listing(duplicates)}; the last one counts, as in aprender. {_POISON}",
            offset=offset,
            reference="ALB-107",
        )
    if constants:
        log.add(
            "apr-metadata-not-finite",
            "error",
            f"the metadata hold {listing(constants)}, which is not JSON: aprender refuses the file, realizar goes on "
            "without any metadata",
            offset=offset,
        )
    return metadata


def _check_encodable(value: Any, offset: int) -> None:
    """A lone surrogate passes Python's parser, but no other's, and cannot be printed or written."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise CheckpointError(
                f"the metadata hold half of a surrogate pair in {item[:40]!r}, which is no text",
                offset=offset,
                fix=_FIX,
            )


def read_fields(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> dict[str, Field]:
    """The canonical keys that have a usable value, whatever their spelling.

    Args:
        metadata: as parsed.
        offset: of the metadata section, for messages.
        log: where findings about spellings, nulls and types go.

    Returns:
        Canonical key to value and spelling. Integers are `int`, floats finite `float`, `architecture` a `str`.
    """
    fields: dict[str, Field] = {}
    for canonical, aliases in ALIASES.items():
        sides = tuple(side for side, key in SIDE_SPELLINGS.items() if key == canonical)
        present = [key for key in (canonical, *aliases) if key in metadata]
        if len(present) > 1:
            _report_poison(canonical, present, metadata, offset, log)
        for key in (*present, *(side for side in sides if side in metadata)):
            value = _typed(canonical, key, metadata[key], offset, log)
            if value is not None:
                fields[canonical] = Field(value, key)
                break
        if canonical in fields and fields[canonical].spelling in sides:
            log.add(
                "apr-metadata-side-spelling",
                "warning",
                f"{canonical} is spelled {fields[canonical].spelling!r}, as only realizar's side formats do; other "
                "readers take their default",
                offset=offset,
                reference="apr-format.md 1.7",
            )
    _report_nulls(metadata, offset, log)
    _report_types(metadata, offset, log)
    return fields


def _typed(canonical: str, key: str, value: Any, offset: int, log: FindingLog) -> Any:
    if value is None:
        return None
    if canonical == "architecture":
        if isinstance(value, str):
            return value
        _report_type(key, value, "a string", offset, log)
        return None
    wanted = "an integer" if canonical in INTEGER_KEYS else "a number"
    number = value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _report_type(key, value, wanted, offset, log)
        return None
    if isinstance(value, str) or (wanted == "an integer" and isinstance(value, float)):
        _report_type(key, value, wanted, offset, log)
        try:
            number = float(value)
        except ValueError:
            return None
    if wanted == "a number":
        try:
            number = float(number)
        except OverflowError:
            number = math.inf
    if isinstance(number, float) and not math.isfinite(number):
        log.add(
            "apr-metadata-not-finite",
            "error",
            f"{key} is {value}; it counts as absent here. realizar refuses constants out of their bounds",
            offset=offset,
        )
        return None
    if wanted == "a number":
        return number
    return int(number) if number == int(number) else None


def _report_poison(
    canonical: str, present: list[str], metadata: Mapping[str, Any], offset: int, log: FindingLog
) -> None:
    values = {key: metadata[key] for key in present}
    shown = ", ".join(f"{key} = {json.dumps(value)[:40]}" for key, value in values.items())
    log.add(
        "apr-metadata-poison",
        "error",
        f"{canonical} is there in more than one spelling: {shown}. {_POISON}",
        offset=offset,
        reference="#2254, C-APR-MERGE-RUNNABLE",
    )
    if any(value is None for value in values.values()) and any(value is not None for value in values.values()):
        log.add(
            "apr-metadata-null-shadows",
            "error",
            f"one spelling of {canonical} is null: {shown}. AprTransformer takes the first spelling that it looks up, "
            "null or not, and then computes with its own default",
            offset=offset,
            reference="#2254, GH-478",
        )


def _report_nulls(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> None:
    nulls = [key for key, value in metadata.items() if value is None and key not in ALWAYS_WRITTEN]
    if nulls:
        log.add(
            "apr-metadata-nulls",
            "info",
            f"{len(nulls)} keys are null ({listing(nulls)}), as aprender wrote before #2254; they count as absent",
            offset=offset,
            reference="#2254",
        )
    if "architecture" in nulls and isinstance(metadata.get("model_type"), str):
        log.add(
            "apr-metadata-null-shadows",
            "error",
            "architecture is null and hides model_type: AprTransformer takes the architecture as 'unknown'",
            offset=offset,
            reference="#2254, GH-478",
        )


def _report_types(metadata: Mapping[str, Any], offset: int, log: FindingLog) -> None:
    for keys, kind, wanted in (
        (STRING_KEYS, str, "a string"),
        (OTHER_INTEGER_KEYS, int, "an integer"),
        (OBJECT_KEYS, dict, "an object"),
    ):
        for key in keys:
            value = metadata.get(key)
            # `architecture` was judged with the dimensions already.
            if value is not None and key != "architecture" and (not isinstance(value, kind) or isinstance(value, bool)):
                _report_type(key, value, wanted, offset, log)
    quantization = metadata.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        log.add(
            "apr-quantization-not-object",
            "error",
            f"quantization must be an object, found {json.dumps(quantization)[:40]}: aprender refuses the file. "
            f"{_POISON}",
            offset=offset,
            reference="#194, BUG-APR-044",
        )


def _report_type(key: str, value: Any, wanted: str, offset: int, log: FindingLog) -> None:
    log.add(
        "apr-metadata-type",
        "error",
        f"{key} must be {wanted}, found {json.dumps(value)[:60]}: aprender may refuse the file, realizar's typed parse "
        "fails and it loses all metadata",
        offset=offset,
        reference="#2254",
    )
