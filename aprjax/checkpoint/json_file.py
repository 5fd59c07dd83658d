"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aprjax.checkpoint.mapped_file import map_file
from aprjax.checkpoint.types import CheckpointError

# The safetensors library's own limit for a header; no tokenizer.json comes near it (Qwen2: 7 MB).
MAX_JSON_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, no JSON, or no object.
    """
    return parse_json(map_file(path).data, path)


def parse_json(raw: Any, file: Path, *, offset: int = 0) -> dict[str, Any]:
    """The object in some bytes (any buffer), which stand at `offset` in `file`.

    Raises:
        CheckpointError: no JSON, a key given twice, or no object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r:.80} is given twice")
        return result

    fix = "the file is damaged: download or convert it again"
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{len(raw)} bytes of JSON; the limit is {MAX_JSON_BYTES}", file=file, offset=offset, fix=fix
        )
    try:
        content = json.loads(bytes(raw).decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"expected JSON, found bytes that are not UTF-8: {error.reason}",
            file=file,
            offset=offset + error.start,
            fix=fix,
        ) from error
    except json.JSONDecodeError as error:
        # error.pos counts characters; the offset is exact where everything before it is ASCII.
        at = offset + len(error.doc[: error.pos].encode(errors="surrogatepass"))
        raise CheckpointError(f"expected JSON: {error.msg}", file=file, offset=at, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the JSON cannot be read: {error}", file=file, offset=offset, fix=fix) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"expected a JSON object, found {type(content).__name__}", file=file, offset=offset, fix=fix
        )
    return content
