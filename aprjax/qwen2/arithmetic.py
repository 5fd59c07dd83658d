"""How an engine computes: `Arithmetic`, composed of named choices, and its presets.

Each choice can be switched alone (`dataclasses.replace`), which is what separates causes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Matmul = Literal["dequantize", "integer", "integer-as-float"]
Activations = Literal["engine", "realizar", "per 256", "per 32"]
Norm = Literal["float", "double-sum", "lanes", "sequential"]
Rope = Literal["closed-form", "iterated", "powf"]
Rotation = Literal["compiled", "fused", "separate"]
Exponential = Literal["library", "polynomial"]
Softmax = Literal["float", "double-sum", "sequential"]
KvCache = Literal["model", "float16"]
Float = Literal["float32", "float64"]
MatrixKernel = Literal["repack", "tiled", "tinyblas"]
Attention = Literal["plain", "flash"]
Vectors = Literal["avx2", "avx512"]


@dataclass(frozen=True)
class Arithmetic:
    """An engine's way of computing a Qwen2.

    With `dtype` float64 only `matmul`, `activations`, `kv_cache` and `rope` are read: the same real
    numbers, and none of an engine's rounding. With float32 norm's scale and rotation hold to the bit; sums are
    re-associated and the polynomial is rounded as it is compiled, unless `exact` says otherwise.

    Attributes:
        name: the preset's name, as it appears in reports.
        matmul: `dequantize` decodes the weights and multiplies floats; `integer` quantizes the
            activations and sums integers exactly; `integer-as-float` quantizes the activations likewise
            but multiplies the decoded values in `dtype`: the same real numbers, other rounding.
        dtype: of activations and float sums.
        kv_cache: what keys and values are stored as: `model` is `dtype`. `float16` also rounds the queries
            and the probabilities, as ggml does with a float16 cache and flash attention off.
        rope: `closed-form` angles `position * theta^(-2i/d)` in double precision; `iterated`: ggml's float32
            recurrence with libm's cosf and sinf (`ggml_rope_cache_init`); `powf`: realizar's float32
            `position * (1 / powf(theta, 2i/d))`.
        activations: what activations are quantized to when `matmul` is not `dequantize`. `engine`: the block
            type that ggml's `vec_dot` pairs with the weight's; `realizar`: its own choice by weight type,
            float scales, ties away from zero (`aprjax.qwen2.realizar`); `per 256`: Q8_K for every quantized
            weight whose width allows; `per 32`: Q8_1 for every quantized weight, as ggml's GPU kernels do.
        norm: how RMSNorm sums squares. `float`: in `dtype`, as compiled; `double-sum`: float32 squares in double
            precision, then the square root, then a division (ggml); `lanes`: 4 accumulators of 8
            float32 lanes (trueno's AVX2); `sequential`: one float32 accumulator, and a division by the
            root instead of a multiplication by its inverse (apr's traced path).
        rotation: `compiled`: products and sums as the compiler fuses them; `fused`: one product of each pair
            is rounded, the other fused into the sum (ggml as gcc contracts it); `separate`: both are rounded.
        exponential: of softmax and SwiGLU: `library`, or `polynomial`: ggml's AVX2 `ggml_v_expf`.
        softmax: how the exponentials are summed. `float`: in `dtype`; `double-sum`: double sum of 8-lane
            float32 sums, and a multiplication by the float32 inverse (ggml); `sequential`: one float32
            accumulator, and a multiplication by the inverse (realizar).
        exact: follow llama.cpp's order of operations in every sum, to the bit of its plain AVX2 build
            on a CPU. It concerns the choices that are llama.cpp's; the others stay as they are.
        kernels: what llama.cpp's build has beside `vec_dot`, and the run allows: `repack`ed weights, `tiled` K-quants,
            `tinyblas` (`aprjax.blocks.default_twins`). They differ in the order of their sums alone: read if `exact`.
        attention: `plain`: scores, softmax and weighted values are three operations; `flash`: one kernel
            (`aprjax.qwen2.flash`), with a float16 cache. For fewer than 64 queries it keeps its sums in float16, to
            the bit with or without `exact`. Scores and probabilities are then those of a plain attention, which
            nothing is computed from.
        vectors: the processor's, as llama.cpp was compiled for them: with AVX-512 the polynomial exponential rounds
            otherwise, and sums of floats have 16 lanes.
    """

    name: str
    matmul: Matmul = "dequantize"
    dtype: Float = "float32"
    kv_cache: KvCache = "model"
    rope: Rope = "closed-form"
    activations: Activations = "engine"
    norm: Norm = "float"
    rotation: Rotation = "compiled"
    exponential: Exponential = "library"
    softmax: Softmax = "float"
    exact: bool = False
    kernels: tuple[MatrixKernel, ...] = ()
    attention: Attention = "plain"
    vectors: Vectors = "avx2"

    @property
    def depends_on_batch(self) -> bool:
        """Whether a position's values hang on how many positions are computed with it: then none may be padding."""
        return self.flash or (self.emulates and self.exact and bool(self.kernels))

    @property
    def flash(self) -> bool:
        """Whether attention is ggml's one kernel."""
        return self.emulates and self.attention == "flash"

    @property
    def lanes(self) -> Literal[8, 16]:
        """Of one register of float32."""
        return 16 if self.vectors == "avx512" else 8

    @property
    def emulates(self) -> bool:
        """Whether an engine's rounding is followed at all: float64 has none of it."""
        return self.dtype == "float32"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


# llama.cpp's CPU path with a float32 KV cache and flash attention off, sums re-associated.
_LLAMA_CPP = Arithmetic(
    "llama.cpp",
    matmul="integer",
    rope="iterated",
    norm="double-sum",
    rotation="fused",
    exponential="polynomial",
    softmax="double-sum",
)
_DEFAULT_BUILD = replace(_LLAMA_CPP, name="llama.cpp-default", exact=True, kernels=("repack", "tiled", "tinyblas"))
# realizar's `OwnedQuantizedModel::forward_cached` (kernels.md section 7).
_REALIZAR = Arithmetic(
    "realizar",
    matmul="integer-as-float",
    rope="powf",
    activations="realizar",
    norm="lanes",
    rotation="separate",
    softmax="sequential",
)

PRESETS: dict[str, Arithmetic] = {
    preset.name: preset
    for preset in (
        Arithmetic("float32"),
        # The arbiter: decoded weights, everything in double precision.
        Arithmetic("float64", dtype="float64"),
        _LLAMA_CPP,
        # The same in the plain AVX2 build's own order of operations: bit for bit, on a CPU.
        replace(_LLAMA_CPP, name="llama.cpp-exact", exact=True),
        replace(_LLAMA_CPP, name="llama.cpp-f16", kv_cache="float16"),
        replace(_LLAMA_CPP, name="llama.cpp-f16-exact", kv_cache="float16", exact=True),
        # With flash attention.
        replace(_LLAMA_CPP, name="llama.cpp-flash", kv_cache="float16", attention="flash"),
        replace(_LLAMA_CPP, name="llama.cpp-flash-exact", kv_cache="float16", attention="flash", exact=True),
        # The build that `pip install llama-cpp-python` gives, on a processor without AVX-512, and on one with it.
        # Always exact: its kernels differ from the plain build's in the order of their sums alone.
        _DEFAULT_BUILD,
        replace(_DEFAULT_BUILD, name="llama.cpp-default-avx512", vectors="avx512"),
        replace(_DEFAULT_BUILD, name="llama.cpp-default-flash", kv_cache="float16", attention="flash"),
        _REALIZAR,
        # The same with its integer dots in their own lanes and order, as far as they are known (docs/architecture.md).
        replace(_REALIZAR, name="realizar-integer", matmul="integer"),
        # `AprTransformer::forward_traced`: decoded weights, float32 throughout.
        replace(_REALIZAR, name="realizar-f32", matmul="dequantize", activations="engine", norm="sequential"),
        # Activations as ggml's GPU kernels quantize them; the rest is float32.
        Arithmetic("q8_1", matmul="integer-as-float", activations="per 32"),
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
