"""`altered`: a checkpoint with other values or another config, in memory, which owns up to being no file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.blocks import encode
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor


def altered(
    checkpoint: Checkpoint, values: Mapping[str, np.ndarray | EncodedTensor] | None = None, **config: Any
) -> Checkpoint:
    """The checkpoint with something changed: for planting a fault, or for trying a repair.

    Its path is no file's, and its `sha256()` a digest of what was changed, so that neither a trace nor a report of it
    can be taken for one of the file.

    Args:
        checkpoint: what is changed; it stays as it is.
        values: by canonical name: values `float32[out, in]`, which are encoded in the tensor's own block type; or an
            encoded tensor, whose bytes are taken as they are, under this name.
        config: keys of `ModelConfig`, as in `rope_theta=1e4`.

    Raises:
        CheckpointError: there is no such tensor or key, or the values have another shape.
    """
    if unknown := sorted(set(config) - set(checkpoint.config.to_json())):
        known = ", ".join(checkpoint.config.to_json())
        raise CheckpointError(f"the config has no key {unknown[0]!r}", file=checkpoint.path, fix=f"known: {known}")
    tensors = dict(checkpoint.tensors)
    digest = hashlib.sha256(f"{checkpoint.sha256()} {sorted(config.items())}".encode())
    for name, value in (values or {}).items():
        if name not in tensors:
            raise CheckpointError("there is no such tensor", file=checkpoint.path, tensor=name, fix="see .tensors")
        tensors[name] = _tensor(tensors[name], value)
        digest.update(f"{name} {tensors[name].block_type} ".encode())
        digest.update(tensors[name].data.data)
    return replace(
        checkpoint,
        path=Path(f"{checkpoint.path.name} (altered)"),
        config=replace(checkpoint.config, **config),
        tensors=tensors,
        files=(),
        digest=digest.hexdigest(),
    )


def _tensor(old: EncodedTensor, value: np.ndarray | EncodedTensor) -> EncodedTensor:
    if value.shape != old.shape:
        raise CheckpointError(
            f"expected the shape {list(old.shape)}, found {list(value.shape)}", file=old.file, tensor=old.name
        )
    if isinstance(value, EncodedTensor):
        return replace(value, name=old.name, stored_name=old.stored_name)
    packed = encode(old.block_type, np.ascontiguousarray(value, np.float32))
    return EncodedTensor(old.name, old.shape, old.block_type, packed, stored_name=old.stored_name)
