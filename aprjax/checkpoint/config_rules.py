"""From the numbers a file states to a `ModelConfig`, or a message that says which number is impossible."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.types import CheckpointError, ModelConfig, RopePairing

# The bounds that realizar's loader sets (apr-format.md 2.3): a config beyond them runs in no
# engine that this tool judges, so it is damage rather than a model.
INTEGER_LIMITS = {
    "hidden_size": (1, 65_536),
    "num_layers": (1, 256),
    "num_heads": (1, 256),
    "num_kv_heads": (1, 256),
    # head_dim has no bound of its own there: one head may take all of hidden_size.
    "head_dim": (2, 65_536),
    "intermediate_size": (1, 262_144),
    "vocab_size": (1, 1_000_000),
    "max_position_embeddings": (1, 2_097_152),
}
FLOAT_LIMITS = {"rope_theta": (1.0, 1e8), "rms_norm_eps": (1e-10, 0.01)}
# llama.cpp's default where `{arch}.rope.freq_base` is absent, and transformers' for `rope_theta`.
DEFAULT_ROPE_THETA = 10_000.0


def build_config(
    file: Path,
    *,
    architecture: str,
    rope_pairing: RopePairing = "neox",
    head_dim: int | None = None,
    keys: dict[str, str] | None = None,
    **numbers: Any,
) -> ModelConfig:
    """Check every number of a config and build it.

    Args:
        file: for messages.
        architecture: `qwen2`.
        rope_pairing: how the file says channels pair up.
        head_dim: stated head width; `None` derives it from `hidden_size / num_heads`.
        keys: for messages: the file's own name of a field (`{"num_heads": "qwen2.attention.head_count"}`).
        numbers: the other fields of `ModelConfig`; `None` where the file does not say.

    Raises:
        CheckpointError: a number is absent, of the wrong type, not finite, out of bounds, or
            contradicts another.
    """
    spelled = keys or {}
    values: dict[str, Any] = dict(numbers)
    for name, (low, high) in INTEGER_LIMITS.items():
        if name != "head_dim":
            values[name] = _integer(file, spelled.get(name, name), values.get(name), low, high)
    for name, (smallest, largest) in FLOAT_LIMITS.items():
        values[name] = _float(file, spelled.get(name, name), values.get(name), smallest, largest)
    heads, kv_heads, hidden = values["num_heads"], values["num_kv_heads"], values["hidden_size"]
    if head_dim is None:
        if hidden % heads:
            raise _impossible(file, f"hidden size {hidden} is no multiple of {heads} heads, and no head width is given")
        head_dim = hidden // heads
    head_dim = _integer(file, spelled.get("head_dim", "head_dim"), head_dim, *INTEGER_LIMITS["head_dim"])
    if head_dim % 2:
        raise _impossible(file, f"head width {head_dim} is odd: its channels cannot be rotated in pairs")
    if heads % kv_heads:
        raise _impossible(file, f"{heads} heads cannot share {kv_heads} key-value heads evenly")
    return ModelConfig(architecture=architecture, rope_pairing=rope_pairing, head_dim=head_dim, **values)


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999997e-07 -> 1e-06.

    GGUF keeps constants in float32 where APR and config.json write decimals; this makes the same
    constant compare equal whichever file it came from.
    """
    return float(str(np.float32(value)))


def _integer(file: Path, name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        found = "nothing" if value is None else f"{value!r}"
        raise _impossible(file, f"expected an integer {name}, found {found[:80]}")
    if not low <= value <= high:
        raise _impossible(file, f"expected {name} between {low} and {high}, found {value}")
    return value


def _float(file: Path, name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = "nothing" if value is None else f"{value!r}"
        raise _impossible(file, f"expected a number {name}, found {found[:80]}")
    # An integer of a JSON file may be too large for a float.
    number = float(value) if abs(value) <= high else math.inf
    if not low <= number <= high:
        raise _impossible(file, f"expected {name} between {low:g} and {high:g}, found {value!r:.80}")
    return number


def _impossible(file: Path, message: str) -> CheckpointError:
    return CheckpointError(message, file=file, fix="the model's config is damaged or incomplete: convert it again")
