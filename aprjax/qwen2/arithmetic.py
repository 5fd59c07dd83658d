"""How an engine computes: `Arithmetic`, composed of named choices, and its presets.

Each choice can be switched alone (`dataclasses.replace`), which is what separates causes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Matmul = Literal["dequantize", "integer", "integer-as-float"]
Float = Literal["float32", "float64"]


@dataclass(frozen=True)
class Arithmetic:
    """An engine's way of computing a Qwen2.

    Attributes:
        name: the preset's name, as it appears in reports.
        matmul: `dequantize` decodes the weights and multiplies floats; `integer` quantizes the
            activations to the block type that ggml's `vec_dot` pairs with the weight's and sums
            integers exactly; `integer-as-float` quantizes the activations likewise but multiplies the
            decoded values in `dtype`: the same real numbers, other rounding.
        dtype: of activations and float sums.
        kv_cache: what keys and values are stored as. `float16` also rounds the queries and the
            probabilities, as ggml does with a float16 cache and flash attention off.
        rope: `closed-form` angles `position * theta^(-2i/d)`, or `iterated`: ggml's float32
            recurrence with libm's cosf and sinf (`ggml_rope_cache_init`).
    """

    name: str
    matmul: Matmul = "dequantize"
    dtype: Float = "float32"
    kv_cache: Literal["model", "float16"] = "model"
    rope: Literal["closed-form", "iterated"] = "closed-form"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


PRESETS: dict[str, Arithmetic] = {
    preset.name: preset
    for preset in (
        Arithmetic("float32"),
        # The arbiter: decoded weights, everything in double precision.
        Arithmetic("float64", dtype="float64"),
        # llama.cpp's CPU path with a float32 KV cache and flash attention off: integer dots, ggml's
        # rope recurrence. Float sums are re-associated; the engine's own order of operations is the
        # business of the exact mode (docs/architecture.md).
        Arithmetic("llama.cpp", matmul="integer", rope="iterated"),
    )
}


class UnknownArithmetic(ValueError):
    """An arithmetic that is not a preset."""


def preset(name: str) -> Arithmetic:
    """The preset of that name.

    Raises:
        UnknownArithmetic: there is none; the message lists those that exist.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UnknownArithmetic(f"arithmetic {name!r} is unknown; known: {', '.join(PRESETS)}") from None
