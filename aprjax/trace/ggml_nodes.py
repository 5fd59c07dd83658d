"""ggml's graph nodes, read through ctypes, and what each is in our words.

Needs nothing but NumPy and ctypes: the library is given. Runs inside the engine's own process
(`llama_cpp_child`); the map from nodes to stages is data.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprjax.qwen2.stages import OUTSIDE, Stage

# Versions of ggml whose struct and whose Qwen2 graph are as written here (kernels.md sections 4 and 8).
KNOWN_GGML = ("0.25.3",)
KNOWN_PYTHON_PACKAGE = "0.3.36"
# ggml.h, `struct ggml_object`: three words and an enum, padded. `ggml_tensor_overhead` counts it in.
_OBJECT_BYTES = 32
_FLOAT_TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}  # enum ggml_type


class EngineMismatch(Exception):
    """The library at hand is not the one this module knows how to read."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml 0.25.3 (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


def declare(base: Any) -> None:
    """Gives the functions of `libggml-base` that are used here their types."""
    for name, result, arguments in (
        ("ggml_version", ctypes.c_char_p, []),
        ("ggml_commit", ctypes.c_char_p, []),
        ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
        ("ggml_op_desc", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_get_data", ctypes.c_void_p, [ctypes.c_void_p]),
        ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments


def check_library(base: Any) -> None:
    """Checks version and struct size before any pointer is followed.

    Raises:
        EngineMismatch: another version, or another struct.
    """
    version = base.ggml_version().decode()
    if version not in KNOWN_GGML:
        raise EngineMismatch(f"expected ggml {' or '.join(KNOWN_GGML)}, found {version}")
    size = base.ggml_tensor_overhead() - _OBJECT_BYTES
    if size != ctypes.sizeof(Tensor):
        raise EngineMismatch(f"expected a struct ggml_tensor of {ctypes.sizeof(Tensor)} bytes, found {size}")


@dataclass(frozen=True)
class Node:
    """One node of the graph, at the moment its value is computed.

    Attributes:
        name: ggml's, without the layer: `Qcur`.
        layer: from the name `Qcur-3`, or from the weight's; -1 outside the layers.
        op: ggml's description of the operation: `MUL_MAT`, `SWIGLU`.
        weight: the name of the first source, if that is a weight of the file: `blk.3.attn_q.weight`.
        address: of the struct.
        tensor: the struct.
    """

    name: str
    layer: int
    op: str
    weight: str
    address: int
    tensor: Tensor


def read_node(base: Any, address: int) -> Node:
    """Reads a node's struct, and checks it against the library's own accessors.

    Raises:
        EngineMismatch: they disagree about name, data or size.
    """
    tensor = Tensor.from_address(address)
    name = tensor.name.decode("utf-8", "replace")
    told = base.ggml_get_name(address).decode("utf-8", "replace"), base.ggml_get_data(address)
    if told != (name, tensor.data):
        raise EngineMismatch(f"expected a node {told[0]!r}, read {name!r}: struct ggml_tensor has another layout")
    source = Tensor.from_address(tensor.src[0]).name.decode("utf-8", "replace") if tensor.src[0] else ""
    weight = source if source.endswith(".weight") else ""
    match = re.fullmatch(r"(.*)-(\d+)", name) or re.fullmatch(r"(blk)\.(\d+)\..*", weight)
    layer = int(match[2]) if match else OUTSIDE
    plain = match[1] if match and match[1] != "blk" else name
    return Node(plain, layer, base.ggml_op_desc(address).decode(), weight, address, tensor)


def read_values(base: Any, node: Node) -> np.ndarray:
    """A copy of a node's value, float32, axes in row-major order (ggml's reversed); views keep their strides.

    Raises:
        EngineMismatch: the value is no float, or its size is not what its strides say.
    """
    tensor = node.tensor
    dtype = _FLOAT_TYPES.get(tensor.type)
    if dtype is None:
        raise EngineMismatch(f"expected float values at {node.name} ({node.op}), found ggml type {tensor.type}")
    shape, strides = tuple(tensor.ne[::-1]), tuple(tensor.nb[::-1])
    nbytes = base.ggml_nbytes(node.address)
    spanned = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(shape) < 1 or nbytes != spanned:
        raise EngineMismatch(f"{node.name} ({node.op}) has {nbytes} bytes, its strides span {spanned}")
    buffer = np.empty(nbytes, np.uint8)
    base.ggml_backend_tensor_get(node.address, buffer.ctypes.data, 0, nbytes)
    values = np.ndarray(shape, dtype, buffer, strides=strides)
    return np.ascontiguousarray(values, np.float32)


# (name, operation) → stage, where the value is the stage's as it stands, rows first.
_DIRECT: dict[tuple[str, str], Stage] = {
    ("embd", "GET_ROWS"): Stage.EMBEDDING,
    ("attn_norm", "MUL"): Stage.ATTN_NORM,
    ("Qcur", "ROPE"): Stage.Q_POST_ROPE,
    ("Kcur", "ROPE"): Stage.K_POST_ROPE,
    ("kqv_out", "CONT"): Stage.ATTENTION,
    ("kqv_out", "RESHAPE"): Stage.ATTENTION,  # with flash attention
    ("ffn_inp", "ADD"): Stage.POST_ATTN_RESIDUAL,
    ("ffn_norm", "MUL"): Stage.FFN_NORM,
    ("ffn_gate", "MUL_MAT"): Stage.FFN_GATE,
    ("ffn_up", "MUL_MAT"): Stage.FFN_UP,
    ("ffn_swiglu", "SWIGLU"): Stage.FFN_SWIGL,  # one kernel: silu(gate) alone is never stored
    ("ffn_out", "MUL_MAT"): Stage.FFN_OUT,
    ("l_out", "ADD"): Stage.POST_FFN_RESIDUAL,
    ("result_norm", "MUL"): Stage.FINAL_NORM,
    ("result_output", "MUL_MAT"): Stage.LM_HEAD,
}
_PROJECTIONS = ("Qcur", "Kcur", "Vcur")
_PROJECTION_STAGES = {"MUL_MAT": Stage.QKV_MATMUL, "ADD": Stage.QKV_BIAS}


def absent_stages(*, flash_attention: bool, stepwise: bool) -> tuple[Stage, ...]:
    """What a run does not yield: ggml's SwiGLU is one kernel, and so is flash attention.

    A step has no scores for the keys that come after it, so stepwise there is no whole row of them.
    """
    scores = (Stage.ATTN_SCORES,) if flash_attention or stepwise else ()
    return (Stage.FFN_SILU, *scores, *((Stage.ATTN_SOFTMAX,) if flash_attention else ()))


@dataclass
class StageMap:
    """Turns nodes, in the order in which they are computed, into stages.

    Attributes:
        count: the number of tokens in this batch.
        keys: the number of tokens up to its end: keys beyond them are the cache's padding.
        emit: given every finished stage, `float32[position, width]`.
    """

    count: int
    keys: int
    emit: Callable[[int, Stage, np.ndarray], None]
    _parts: dict[tuple[int, str, str], np.ndarray] = field(default_factory=dict)
    _scores: dict[int, np.ndarray] = field(default_factory=dict)

    def wants(self, node: Node) -> bool:
        """Whether a stage is made from this node."""
        key = (node.name, node.op)
        return (
            key in _DIRECT
            or (node.name in _PROJECTIONS and node.op in _PROJECTION_STAGES)
            or key in (("kq", "MUL_MAT"), ("kq_soft_max", "SOFT_MAX"))
            or (node.op == "MUL_MAT" and node.weight.endswith(".attn_output.weight"))
        )

    def take(self, node: Node, values: np.ndarray) -> None:
        """Takes one wanted node's value, axes as `read_values` gives them."""
        key = (node.name, node.op)
        if key in _DIRECT:
            self.emit(node.layer, _DIRECT[key], values.reshape(self.count, -1))
        elif node.name in _PROJECTIONS:
            self._parts[node.layer, node.name, node.op] = values.reshape(self.count, -1)
            # V is computed before K; by the first of a layer's residuals all parts are there.
        elif key == ("kq", "MUL_MAT"):
            self._scores[node.layer] = values
        elif key == ("kq_soft_max", "SOFT_MAX"):
            # ggml scales inside the softmax, one rounding to float32, before the mask.
            scale = np.frombuffer(np.int32(node.tensor.op_params[0]).tobytes(), np.float32)[0]
            scores = self._scores.pop(node.layer)
            self.emit(node.layer, Stage.ATTN_SCORES, self._by_position(scores) * scale)
            self.emit(node.layer, Stage.ATTN_SOFTMAX, self._by_position(values))
        else:
            self._projections(node.layer)
            self.emit(node.layer, Stage.ATTN_OUT, values.reshape(self.count, -1))

    def _by_position(self, values: np.ndarray) -> np.ndarray:
        """`[1, head, position, padded key]` → `[position, head * key]`."""
        heads = values.reshape(-1, *values.shape[-2:])[:, :, : self.keys]
        return np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(self.count, -1)

    def _projections(self, layer: int) -> None:
        """q, k and v side by side. A projection without a bias has the same value after it as before."""
        products = [self._parts.pop((layer, name, "MUL_MAT")) for name in _PROJECTIONS]
        biased = [
            self._parts.pop((layer, name, "ADD"), value) for name, value in zip(_PROJECTIONS, products, strict=True)
        ]
        self.emit(layer, Stage.QKV_MATMUL, np.concatenate(products, axis=1))
        self.emit(layer, Stage.QKV_BIAS, np.concatenate(biased, axis=1))


def labels() -> Callable[[Node], str]:
    """Names for raw nodes: `kq-3:MUL_MAT`; a name that comes again gets a number, `norm-3:RMS_NORM#2`."""
    seen: dict[str, int] = {}

    def label(node: Node) -> str:
        base = f"{node.name}{'' if node.layer == OUTSIDE else f'-{node.layer}'}:{node.op}"
        seen[base] = seen.get(base, 0) + 1
        return base if seen[base] == 1 else f"{base}#{seen[base]}"

    return label


def missing_stages(layers: int, written: set[tuple[int, Stage]], *, absent: tuple[Stage, ...]) -> Iterator[str]:
    """Stages that a whole capture holds, `absent` aside, and this one does not."""
    outside = (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)
    wanted = [(layer, stage) for layer in range(layers) for stage in Stage if stage not in (*outside, *absent)]
    for key in [*((OUTSIDE, stage) for stage in outside), *wanted]:
        if key not in written:
            yield f"layer {key[0]} {key[1]}"
