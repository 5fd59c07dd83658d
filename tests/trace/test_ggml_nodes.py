"""ggml's struct is read only where it is the one we know, and what a graph lacks is named."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.ggml_nodes import (
    EngineMismatch,
    Node,
    StageMap,
    Tensor,
    absent_stages,
    check_library,
    labels,
    missing_stages,
    read_node,
    read_values,
)


class Library:
    """What `libggml-base` answers, for one tensor in our own memory."""

    def __init__(self, tensor: Tensor | None = None, *, version: bytes = b"0.25.3", overhead: int = 368) -> None:
        self.tensor, self.version, self.overhead = tensor or Tensor(), version, overhead
        self.nbytes = 0
        self.name: bytes | None = None

    def ggml_version(self) -> bytes:
        return self.version

    def ggml_tensor_overhead(self) -> int:
        return self.overhead

    def ggml_get_name(self, address: int) -> bytes:
        return self.tensor.name if self.name is None else self.name

    def ggml_get_data(self, address: int) -> int | None:
        return self.tensor.data

    def ggml_op_desc(self, address: int) -> bytes:
        return b"MUL_MAT"

    def ggml_nbytes(self, address: int) -> int:
        return self.nbytes

    def ggml_backend_tensor_get(self, address: int, target: int, offset: int, size: int) -> None:
        ctypes.memmove(target, self.tensor.data + offset, size)


def tensor_of(values: np.ndarray, name: bytes = b"kq-3") -> tuple[Tensor, Library]:
    """A struct that points to an array of any strides."""
    tensor = Tensor(type={"f4": 0, "f2": 1, "i4": 26}[values.dtype.str[1:]], data=values.ctypes.data, name=name)
    shape = (1,) * (4 - values.ndim) + values.shape
    strides = (values.strides[0] * values.shape[0],) * (4 - values.ndim) + values.strides
    tensor.ne[:], tensor.nb[:] = shape[::-1], strides[::-1]
    library = Library(tensor)
    spanned = sum((n - 1) * s for n, s in zip(values.shape, values.strides, strict=True))
    library.nbytes = values.dtype.itemsize + spanned
    return tensor, library


def node(name: str, op: str, layer: int, weight: str = "", **fields: object) -> Node:
    return Node(name, layer, op, weight, 0, Tensor(**fields))


def test_the_version_and_the_struct_are_checked() -> None:
    check_library(Library())
    with pytest.raises(EngineMismatch, match=r"expected ggml 0\.25\.3, found 0\.26\.0"):
        check_library(Library(version=b"0.26.0"))
    with pytest.raises(EngineMismatch, match="expected a struct ggml_tensor of 336 bytes, found 352"):
        check_library(Library(overhead=384))


def test_a_struct_of_another_layout_is_seen_at_the_first_node() -> None:
    values = np.ones(3, np.float32)
    tensor, library = tensor_of(values)
    assert read_node(library, ctypes.addressof(tensor)).layer == 3
    library.name = b"Qcur-3"
    with pytest.raises(EngineMismatch, match="another layout"):
        read_node(library, ctypes.addressof(tensor))


def test_names_layers_and_weights() -> None:
    weight = Tensor(name=b"blk.7.attn_output.weight")
    unnamed = Tensor(name=b"node_31")
    unnamed.src[0] = ctypes.addressof(weight)
    found = read_node(Library(unnamed), ctypes.addressof(unnamed))
    assert (found.name, found.layer, found.weight) == ("node_31", 7, "blk.7.attn_output.weight")
    last = Tensor(name=b"result_norm")
    assert read_node(Library(last), ctypes.addressof(last)).layer == OUTSIDE
    named = Tensor(name=b"cache_k_l0 (view)-12")
    assert read_node(Library(named), ctypes.addressof(named)).layer == 12


def test_values_follow_their_strides() -> None:
    stored = np.arange(24, dtype=np.float32).reshape(4, 6)
    for values in (stored, stored[:, :5], stored[::2], stored.T):
        tensor, library = tensor_of(values)
        found = read_node(library, ctypes.addressof(tensor))
        assert np.array_equal(read_values(library, found)[0, 0], values)
    half = stored.astype(np.float16)
    tensor, library = tensor_of(half)
    read = read_values(library, read_node(library, ctypes.addressof(tensor)))
    assert read.dtype == np.float32
    assert np.array_equal(read[0, 0], stored)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tensor, library = tensor_of(np.ones((2, 3), np.float32))
    library.nbytes += 4
    with pytest.raises(EngineMismatch, match="has 28 bytes, its strides span 24"):
        read_values(library, read_node(library, ctypes.addressof(tensor)))
    tensor, library = tensor_of(np.ones((2, 3), np.int32))
    with pytest.raises(EngineMismatch, match="found ggml type 26"):
        read_values(library, read_node(library, ctypes.addressof(tensor)))


def test_a_projection_without_bias_keeps_its_value() -> None:
    taken: dict[tuple[int, Stage], np.ndarray] = {}
    stages = StageMap(1, 1, lambda layer, stage, value: taken.__setitem__((layer, stage), value))
    # V comes before K, and only V has a bias.
    for name, op, value in (
        ("Qcur", "MUL_MAT", 1),
        ("Vcur", "MUL_MAT", 3),
        ("Vcur", "ADD", 30),
        ("Kcur", "MUL_MAT", 2),
    ):
        assert stages.wants(node(name, op, 0))
        stages.take(node(name, op, 0), np.full((1, 2), value, np.float32))
    stages.take(node("node_31", "MUL_MAT", 0, "blk.0.attn_output.weight"), np.zeros((1, 4), np.float32))
    assert taken[0, Stage.QKV_MATMUL].tolist() == [[1, 1, 2, 2, 3, 3]]
    assert taken[0, Stage.QKV_BIAS].tolist() == [[1, 1, 2, 2, 30, 30]]


def test_the_same_name_with_another_operation_is_another_node() -> None:
    stages = StageMap(1, 1, lambda layer, stage, value: None)
    wanted = [op for op in ("MUL_MAT", "ADD", "RESHAPE", "VIEW", "ROPE") if stages.wants(node("Qcur", op, 0))]
    assert wanted == ["MUL_MAT", "ADD", "ROPE"]
    assert not stages.wants(node("node_5", "MUL_MAT", 0, "blk.0.something.weight"))


def test_repeated_names_are_numbered() -> None:
    label = labels()
    nodes = [node("norm", "RMS_NORM", 3), node("norm", "RMS_NORM", 3), node("norm", "RMS_NORM", OUTSIDE)]
    assert [label(n) for n in nodes] == ["norm-3:RMS_NORM", "norm-3:RMS_NORM#2", "norm:RMS_NORM"]


def test_what_a_graph_lacks_is_named() -> None:
    everything = {(OUTSIDE, stage) for stage in (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)}
    everything |= {(0, stage) for stage in Stage if (OUTSIDE, stage) not in everything}
    present = everything - {(0, Stage.FFN_SILU)}
    plain = absent_stages(flash_attention=False, stepwise=False)
    assert list(missing_stages(1, present, absent=plain)) == []
    lacking = present - {(0, Stage.ATTN_SCORES), (0, Stage.FFN_UP)}
    assert list(missing_stages(1, lacking, absent=plain)) == ["layer 0 attn_scores", "layer 0 ffn_up"]
    fused = absent_stages(flash_attention=True, stepwise=False)
    assert list(missing_stages(1, lacking, absent=fused)) == ["layer 0 ffn_up"]
