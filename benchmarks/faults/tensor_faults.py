"""Faults of one tensor (or of two that change places), each with the explanation that `bisect files` must give.

A fault is planted in a file that offers `tensor`, `put` and `set_key` (`container.AprFile`, `gguf_container.GgufFile`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import block_bytes
import numpy as np
from block_bytes import by_blocks
from codec import decode, decode_bytes, encode
from container import PlantError, Tensor


@dataclass(frozen=True)
class Site:
    """Where a fault is planted.

    Attributes:
        name: the tensor's Hugging Face name.
        other: of a second one, for faults of two.
        strength: a factor, a constant or a count; None for the fault's only one.
        head_dim: elements of a head.
        row: a row that the tokens touch, for faults of one row.
    """

    name: str
    other: str | None = None
    strength: float | None = None
    head_dim: int = 64
    row: int = 0


@dataclass(frozen=True)
class TensorFault:
    """A kind of fault.

    Attributes:
        id: its name.
        explained: the ids of `aprjax.bisect.explanations` that are right.
        plant: changes the file; returns the names of the tensors that it changed.
        parameters: what the explanation's parameters must be, of a strength.
        finding: of the reader, which mends the fault and says so: then nothing else may be said.
    """

    id: str
    explained: tuple[str, ...]
    plant: Callable[[Any, Site], list[str]]
    parameters: Callable[[Site], Mapping[str, float]] = lambda site: {}
    finding: str = ""


def values_changed(change: Callable[[np.ndarray, Site], np.ndarray]) -> Callable[[Any, Site], list[str]]:
    """Decoded, changed, and encoded as it was."""

    def plant(file: Any, site: Site) -> list[str]:
        tensor = file.tensor(site.name)
        values = np.ascontiguousarray(change(decode(tensor), site), np.float32)
        if values.shape != tensor.shape:
            raise PlantError(f"{site.name} is {list(tensor.shape)}, not square")
        file.put(tensor.with_bytes(encode(values, tensor.type_name)))
        return [site.name]

    return plant


def rows_changed(change: Callable[[np.ndarray, Site], np.ndarray]) -> Callable[[Any, Site], list[str]]:
    """Whole rows of bytes moved or overwritten; of a vector, its elements."""

    def plant(file: Any, site: Site) -> list[str]:
        tensor = file.tensor(site.name)
        data = np.frombuffer(bytearray(tensor.whole()), np.uint8).reshape(tensor.shape[0], -1)
        file.put(tensor.with_bytes(np.ascontiguousarray(change(data, site)).tobytes()))
        return [site.name]

    return plant


def tensor_changed(change: Callable[[Tensor, Site], Tensor]) -> Callable[[Any, Site], list[str]]:
    """Any change of the one tensor."""

    def plant(file: Any, site: Site) -> list[str]:
        file.put(change(file.tensor(site.name), site))
        return [site.name]

    return plant


def block_fault(change: Callable[[np.ndarray, str], None]) -> Callable[[Any, Site], list[str]]:
    """A change of every block's bytes."""
    return tensor_changed(lambda tensor, site: by_blocks(change)(tensor))


def _exchange(file: Any, site: Site) -> list[str]:
    """Two tensors have each other's bytes."""
    one, other = file.tensor(site.name), file.tensor(site.other)
    if one.shape != other.shape:
        raise PlantError(f"{site.name} and {site.other} are of different shapes")
    file.put(replace(other, name=one.name))
    file.put(replace(one, name=other.name))
    return [site.name, str(site.other)]


def _overwrite(file: Any, site: Site) -> list[str]:
    """A tensor has another's bytes, which stays as it was."""
    one, other = file.tensor(site.name), file.tensor(site.other)
    file.put(replace(other, name=one.name))
    return [site.name]


def _heads(rows: np.ndarray, site: Site) -> np.ndarray:
    """The first two heads have changed places."""
    heads = rows.reshape(-1, site.head_dim, *rows.shape[1:]).copy()
    heads[[0, 1]] = heads[[1, 0]]
    return heads.reshape(rows.shape)


def _rotary(rows: np.ndarray, site: Site) -> np.ndarray:
    """Row 2i + s of a head is what was row s * head / 2 + i: the order of Llama's q and k in GGUF."""
    half = site.head_dim // 2
    source = [h * 2 * half + s * half + i for h in range(len(rows) // (2 * half)) for i in range(half) for s in (0, 1)]
    return rows[source]


def _permuted(rows: np.ndarray, site: Site) -> np.ndarray:
    return rows[np.random.default_rng(len(rows)).permutation(len(rows))]


def _two_rows(rows: np.ndarray, site: Site) -> np.ndarray:
    first, second = len(rows) // 3, 2 * len(rows) // 3
    rows[[first, second]] = rows[[second, first]]
    return rows


def _inserted(rows: np.ndarray, site: Site) -> np.ndarray:
    """One row is there twice, and all behind it stand one further down."""
    at = len(rows) // 2
    return np.concatenate([rows[:at], rows[at - 1 : -1]])


def _copied(rows: np.ndarray, site: Site) -> np.ndarray:
    rows[site.row] = rows[(site.row + 7) % len(rows)]
    return rows


def _zero_row(tensor: Tensor, site: Site) -> Tensor:
    if tensor.type_name in block_bytes.BLOCK_BYTES:
        return block_bytes.scaled(tensor, 0.0, slice(site.row, site.row + 1))
    values = decode(tensor)
    values[site.row] = 0
    return tensor.with_bytes(encode(values, tensor.type_name))


def _of_head(change: float) -> Callable[[np.ndarray, Site], np.ndarray]:
    """The columns of the first head, times a factor."""

    def apply(values: np.ndarray, site: Site) -> np.ndarray:
        values[:, : site.head_dim] *= np.float32(change)
        return values

    return apply


def _columns_exchanged(values: np.ndarray, site: Site) -> np.ndarray:
    return _heads(values.T, site).T


def _misread(tensor: Tensor, site: Site) -> Tensor:
    """The bytes decoded as the type of equal size, and stored as float32, as a converter with a wrong table does."""
    other = {"Q4_K": "Q4_0", "Q5_K": "Q5_0"}.get(tensor.type_name)
    if other is None:
        raise PlantError(f"{tensor.type_name} has no other type of its size")
    values = decode_bytes(tensor.whole(), other, tensor.shape)
    return Tensor(tensor.name, 0, tensor.shape, (values.tobytes(),))


def _twice(tensor: Tensor, site: Site) -> Tensor:
    """Quantized coarser on the way, and back."""
    through = {"Q4_K": "Q4_0", "Q6_K": "Q4_K", "Q8_0": "Q4_0", "Q5_0": "Q4_0"}.get(tensor.type_name)
    if through is None:
        raise PlantError(f"{tensor.type_name} is not quantized")
    rough = decode_bytes(encode(decode(tensor), through), through, tensor.shape)
    return tensor.with_bytes(encode(rough, tensor.type_name))


def _shifted_bytes(tensor: Tensor, site: Site) -> Tensor:
    """Read from some bytes further on; what follows the tensor in the file is zeros."""
    data, by = tensor.whole(), int(site.strength or 32)
    return tensor.with_bytes(data[by:] + bytes(by))


def _big_endian(tensor: Tensor, site: Site) -> Tensor:
    if tensor.type_name != "F32":
        raise PlantError(f"{tensor.type_name} has no order of four bytes")
    return tensor.with_bytes(np.frombuffer(tensor.whole(), "<u4").byteswap().tobytes())


def _add(values: np.ndarray, site: Site) -> np.ndarray:
    return values + np.float32(site.strength or 1.0)


def _folded(values: np.ndarray, site: Site) -> np.ndarray:
    """Every column times a factor of its own, as a norm folded into the matrix that follows it."""
    factors = np.random.default_rng(5).uniform(0.5, 1.5, values.shape[-1]).astype(np.float32)
    return values * factors


def _factor(site: Site) -> Mapping[str, float]:
    return {"factor": float(site.strength or 1.0)}


def _left_out(file: Any, site: Site) -> list[str]:
    """The tensor is not in the file."""
    file.remove(site.name)
    return [site.name]


def _shape_reversed(tensor: Tensor, site: Site) -> Tensor:
    """The index has the dimensions in ggml's order; the bytes are as they were."""
    if tensor.shape[0] == tensor.shape[-1]:
        raise PlantError(f"{site.name} is square")
    return replace(tensor, shape=tensor.shape[::-1])


def _noisy(values: np.ndarray, site: Site) -> np.ndarray:
    """Gaussian noise, relative to the tensor's own deviation."""
    noise = np.random.default_rng(3).normal(0, values.std() * (site.strength or 1.0), values.shape)
    return values + noise.astype(np.float32)


def _scrambled(values: np.ndarray, site: Site) -> np.ndarray:
    """Every element somewhere else."""
    return np.random.default_rng(4).permutation(values.ravel()).reshape(values.shape)


# Faults that no hypothesis is about: the right explanation is none.
CONTROLS = ("control-noise", "control-scrambled")
# Faults of a file that is refused, and the refusal must name the tensor.
REFUSED = ("left-out",)
MENDED = ("shape-reversed",)
TENSOR_FAULTS: dict[str, TensorFault] = {
    fault.id: fault
    for fault in (
        TensorFault("transposed", ("transposed",), values_changed(lambda v, s: v.T)),
        TensorFault("dims-reversed", ("dimensions-exchanged",), values_changed(lambda v, s: v.T.reshape(v.shape))),
        TensorFault("dims-misread", ("dimensions-exchanged",), values_changed(lambda v, s: v.reshape(v.shape[::-1]).T)),
        TensorFault("rows-reversed", ("reversed",), rows_changed(lambda rows, s: rows[::-1])),
        TensorFault("columns-reversed", ("reversed",), values_changed(lambda v, s: v[:, ::-1])),
        TensorFault("rows-permuted", ("rows-permuted",), rows_changed(_permuted)),
        TensorFault("two-rows-exchanged", ("rows-permuted",), rows_changed(_two_rows)),
        TensorFault("row-copied", ("rows-copied",), rows_changed(_copied)),
        TensorFault("heads-permuted", ("heads-permuted",), rows_changed(_heads)),
        TensorFault("head-columns-permuted", ("heads-permuted",), values_changed(_columns_exchanged)),
        TensorFault("rotary-interleaved", ("rotary-interleaved",), rows_changed(_rotary)),
        TensorFault(
            "rows-shifted",
            ("rows-shifted",),
            rows_changed(lambda rows, s: np.roll(rows, int(s.strength or 1), axis=0)),
            lambda site: {"by": float(site.strength or 1)},
        ),
        TensorFault("row-inserted", ("rows-shifted",), rows_changed(_inserted)),
        TensorFault("exchanged", ("another-tensor",), _exchange),
        TensorFault("other-name", ("another-tensor",), _overwrite),
        TensorFault("nibbles-interleaved", ("nibbles-reordered",), block_fault(block_bytes.interleave_nibbles)),
        TensorFault("nibbles-exchanged", ("nibbles-reordered",), block_fault(block_bytes.exchange_nibbles)),
        TensorFault("high-bits-dropped", ("high-bits-dropped",), block_fault(block_bytes.drop_high_bits)),
        TensorFault("scale-bits-dropped", ("scale-bits-dropped",), block_fault(block_bytes.drop_scale_bits)),
        TensorFault("minimum-lost", ("minimum-lost",), block_fault(block_bytes.lose_minimum)),
        TensorFault("minimum-exchanged", ("minimum-lost",), block_fault(block_bytes.exchange_minimum)),
        TensorFault(
            "scaled",
            ("scaled",),
            tensor_changed(lambda tensor, site: block_bytes.scaled(tensor, float(site.strength or 1.0))),
            _factor,
        ),
        TensorFault(
            "scaled-encoded-again",
            ("scaled",),
            values_changed(lambda v, s: v * np.float32(s.strength or 1.0)),
            _factor,
        ),
        TensorFault(
            "head-scaled",
            ("scaled",),
            tensor_changed(lambda t, s: block_bytes.scaled(t, s.strength or 0.5, slice(s.head_dim, 2 * s.head_dim))),
            lambda site: {"factor": float(site.strength or 0.5)},
        ),
        TensorFault("head-columns-scaled", ("scaled",), values_changed(_of_head(0.5))),
        TensorFault("norm-folded", ("scaled",), values_changed(_folded)),
        TensorFault("shifted", ("shifted",), values_changed(_add), lambda s: {"constant": float(s.strength or 1.0)}),
        TensorFault("zeroed", ("zeroed",), tensor_changed(lambda t, s: t.with_bytes(bytes(t.size)))),
        TensorFault("row-zeroed", ("zeroed",), tensor_changed(_zero_row)),
        TensorFault("type-misread", ("type-misread",), tensor_changed(_misread)),
        TensorFault("double-quantized", ("double-quantized",), tensor_changed(_twice)),
        TensorFault("bytes-shifted", ("bytes-shifted",), tensor_changed(_shifted_bytes)),
        TensorFault("big-endian", ("byte-order",), tensor_changed(_big_endian)),
        TensorFault("left-out", ("missing",), _left_out),
        TensorFault("shape-reversed", (), tensor_changed(_shape_reversed), finding="apr-shapes-reversed"),
        TensorFault("control-noise", ("",), values_changed(_noisy)),
        TensorFault("control-scrambled", ("",), values_changed(_scrambled)),
        TensorFault("nan", ("not-finite",), tensor_changed(lambda tensor, site: block_bytes.with_nan(tensor))),
    )
}
