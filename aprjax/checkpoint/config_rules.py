"""From the numbers a file states to a `ModelConfig`, or a message that says which number is impossible."""

from __future__ import annotations

from collections.abc import Callable
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
    offsets: dict[str, int] | None = None,
    **numbers: Any,
) -> ModelConfig:
    """Check every number of a config and build it.

    Args:
        file: for messages.
        architecture: `qwen2`.
        rope_pairing: how the file says channels pair up.
        head_dim: stated head width; `None` derives it from `hidden_size / num_heads`.
        keys: for messages: the file's own name of a field (`{"num_heads": "qwen2.attention.head_count"}`).
        offsets: for messages: where in the file a field stands (0 for one that is absent).
        numbers: the other fields of `ModelConfig`; `None` where the file does not say.

    Raises:
        CheckpointError: a number is absent, of the wrong type, not finite, out of bounds, or
            contradicts another.
    """
    spelled, places = keys or {}, offsets or {}

    def fail(name: str) -> Callable[[str], CheckpointError]:
        fix = "the model's config is damaged or incomplete: convert it again"
        return lambda message: CheckpointError(message, file=file, offset=places.get(name), fix=fix)

    def integer(name: str, value: Any) -> int:
        return _integer(spelled.get(name, name), value, INTEGER_LIMITS[name], fail(name))

    values: dict[str, Any] = dict(numbers)
    for name in INTEGER_LIMITS:
        if name != "head_dim":
            values[name] = integer(name, values.get(name))
    for name, limits in FLOAT_LIMITS.items():
        values[name] = _float(spelled.get(name, name), values.get(name), limits, fail(name))
    heads, kv_heads, hidden = values["num_heads"], values["num_kv_heads"], values["hidden_size"]
    if head_dim is None:
        if hidden % heads:
            message = f"hidden size {hidden} is no multiple of {heads} heads, and no head width is given"
            raise fail("num_heads")(message)
        head_dim = hidden // heads
    head_dim = integer("head_dim", head_dim)
    if head_dim % 2:
        raise fail("num_heads")(f"head width {head_dim} is odd: its channels cannot be rotated in pairs")
    if heads % kv_heads:
        raise fail("num_kv_heads")(f"{heads} heads cannot share {kv_heads} key-value heads evenly")
    return ModelConfig(architecture=architecture, rope_pairing=rope_pairing, head_dim=head_dim, **values)


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999997e-07 -> 1e-06.

    GGUF keeps constants in float32 where APR and config.json write decimals; this makes the same
    constant compare equal whichever file it came from.
    """
    return float(str(np.float32(value)))


def _integer(name: str, value: Any, limits: tuple[int, int], fail: Callable[[str], CheckpointError]) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(f"expected an integer {name}, found {_shown(value)}")
    if not limits[0] <= value <= limits[1]:
        raise fail(f"expected {name} between {limits[0]} and {limits[1]}, found {_shown(value)}")
    return value


def _float(name: str, value: Any, limits: tuple[float, float], fail: Callable[[str], CheckpointError]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(f"expected a number {name}, found {_shown(value)}")
    # An integer of a JSON file may be too large for a float, so compare before converting.
    if not limits[0] <= value <= limits[1]:
        raise fail(f"expected {name} between {limits[0]:g} and {limits[1]:g}, found {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]
