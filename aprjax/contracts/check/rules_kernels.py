"""Q4_K, Q6_K and Q8_K on the model's own blocks: sizes, decoding, quantized activations, products."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from aprjax.blocks import block_format, byte_size
from aprjax.blocks.activations import quantize_q8_k
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.contracts.check.measurement import Asked, Measurement, measures

# Rows of a tensor that are looked at: enough for every kind of block, few enough to take no time.
ROWS = 64
KINDS = ("Q4_K", "Q6_K")
# Activations to multiply by: embedding rows, scaled to rms 1 as a norm does.
TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """Some rows of one tensor.

    Attributes:
        tensor: the tensor.
        packed: its rows, `uint8[rows, blocks, block_bytes]`.
        values: decoded by gguf-py, which shares no code with aprjax: `float32[rows, columns]`.
    """

    tensor: EncodedTensor
    packed: np.ndarray
    values: np.ndarray


def _samples(asked: Asked) -> list[Sample]:
    return asked.bench.once("samples", lambda: list(_taken(asked.bench.checkpoint("model"))))


def _taken(file: Checkpoint) -> Any:
    """The first projection of each kind that the file holds; tables of the vocabulary only where there is none."""
    import gguf

    for kind in KINDS:
        found = [t for t in file.tensors.values() if t.block_type == kind and len(t.shape) == 2 and not t.row_padded]
        found = [tensor for tensor in found if tensor.shape[1] % 256 == 0]
        chosen = next((t for t in found if "layers." in t.name), found[0] if found else None)
        if chosen is not None:
            packed = np.ascontiguousarray(chosen.packed()[:ROWS])
            values = gguf.quants.dequantize(packed.reshape(len(packed), -1), gguf.GGMLQuantizationType[kind])
            yield Sample(chosen, packed, values)


NONE = "the model's file holds neither Q4_K nor Q6_K in rows of whole blocks"


@measures("FALSIFY-QS-001", "FALSIFY-QS-006")
def block_sizes(asked: Asked) -> Measurement:
    """Bytes of a block, and of every tensor of the file that is made of them."""
    tensors = [t for t in asked.bench.checkpoint("model").tensors.values() if t.block_type in KINDS]
    if not tensors:
        return Measurement(unmeasured=NONE)
    wrong = 0
    for tensor in tensors:
        rows, columns = tensor.shape[0], tensor.shape[-1]
        blocks = rows * -(-columns // 256) if columns % 256 == 0 or tensor.row_padded else -(-rows * columns // 256)
        wrong += tensor.nbytes != blocks * {"Q4_K": 144, "Q6_K": 210}[tensor.block_type]
    sizes = {f"{kind.lower()}_bytes": block_format(kind).block_bytes for kind in KINDS}
    return Measurement({**sizes, "wrong_tensors": wrong}, f"{len(tensors)} tensors of K-quants")


@measures("FALSIFY-QS-002")
def bytes_grow(asked: Asked) -> Measurement:
    """More columns never take fewer bytes."""
    rows = asked.bench.checkpoint("model").config.hidden_size
    decreases = 0
    for kind in KINDS:
        sizes = [byte_size(kind, (rows, 256 * blocks)) for blocks in range(1, 129)]
        decreases += sum(b <= a for a, b in pairwise(sizes))
    return Measurement({"decreases": decreases}, f"{rows} rows of 256 to 32,768 columns")


@measures("FALSIFY-QS-003")
def finite_values(asked: Asked) -> Measurement:
    """No block of the model's K-quants decodes to anything but finite numbers."""
    from aprjax.checkpoint.finite import finite_findings

    file = asked.bench.checkpoint("model")
    tensors = [tensor for tensor in file.tensors.values() if tensor.block_type in KINDS]
    if not tensors:
        return Measurement(unmeasured=NONE)
    found = asked.bench.once("finite", lambda: finite_findings(tensors))
    return Measurement({"tensors_not_finite": len(found)}, f"{len(tensors)} tensors, every block's scales")


@measures("FALSIFY-QS-004")
def no_offset(asked: Asked) -> Measurement:
    """Q6_K has no offset: blocks whose scale is zero decode to zeros."""
    sample = next((s for s in _samples(asked) if s.tensor.block_type == "Q6_K"), None)
    if sample is None:
        return Measurement(unmeasured="the model's file holds no Q6_K in rows of whole blocks")
    blocks = sample.packed.reshape(-1, 210).copy()
    blocks[:, 208:] = 0
    return Measurement(
        {"largest_offset": float(np.abs(block_format("Q6_K").decode(blocks)).max())}, f"{len(blocks)} blocks"
    )


@measures("FALSIFY-QS-007")
def decoders_agree(asked: Asked) -> Measurement:
    """NumPy, jax and gguf-py decode the model's blocks to the same bits."""
    samples = _samples(asked)
    if not samples:
        return Measurement(unmeasured=NONE)
    differing = count = 0
    for sample in samples:
        blocks, reference = block_format(sample.tensor.block_type), sample.values.reshape(-1, 256)
        packed = sample.packed.reshape(len(reference), -1)
        assert blocks.decode_jax is not None
        for decode in (blocks.decode, blocks.decode_jax):
            values = np.ascontiguousarray(np.asarray(decode(packed), np.float32))
            differing += int(np.count_nonzero(values.view(np.uint32) != reference.view(np.uint32)))
        count += reference.size
    return Measurement({"differing_values": differing, "values": count}, _named(samples))


def _named(samples: list[Sample]) -> str:
    return ", ".join(f"{s.tensor.name} ({s.tensor.block_type}, {len(s.packed)} rows)" for s in samples)


def _activations(asked: Asked, width: int) -> np.ndarray:
    """Embedding rows scaled to rms 1, repeated or cut to a width: `float32[TOKENS, width]`."""
    table = asked.bench.checkpoint("model").tensors["model.embed_tokens.weight"]
    rows = table.decode_rows(slice(TOKENS, 2 * TOKENS)).astype(np.float64)
    rows /= np.sqrt(np.mean(rows**2, axis=1, keepdims=True)) + 1e-30
    copies = -(-width // rows.shape[1])
    return np.ascontiguousarray(np.tile(rows, copies)[:, :width], np.float32)


@measures("FALSIFY-QS-005")
def sums_of_activations(asked: Asked) -> Measurement:
    """The sums in a Q8_K block are those of its codes, whatever the weights are."""
    found = quantize_q8_k(_activations(asked, 1024))
    expected = np.asarray(found.codes, np.int64).reshape(*found.sums.shape, 16).sum(axis=-1)
    wrong = int(np.count_nonzero(expected != found.sums))
    return Measurement(
        {"wrong_sums": wrong, "sums": int(expected.size)}, "embedding rows of the model, scaled to rms 1"
    )


@measures("APRJAX-Q8K-001")
def rounding_of_activations(asked: Asked) -> Measurement:
    """A Q8_K code is the nearest one."""
    x = _activations(asked, 1024)
    found = quantize_q8_k(x)
    scale = np.asarray(found.scale, np.float64)[..., None]
    error = np.abs(x.reshape(found.codes.shape) - scale * np.asarray(found.codes, np.float64))
    steps = np.divide(error, np.abs(scale), out=np.zeros_like(error), where=scale != 0)
    return Measurement({"largest_error_in_steps": float(steps.max())}, f"{x.size} activations")


def _products(asked: Asked) -> list[tuple[Sample, np.ndarray, np.ndarray, np.ndarray]]:
    """(sample, integer product, the same numbers in float64, product without rounding the activations)."""

    def make() -> list[tuple[Sample, np.ndarray, np.ndarray, np.ndarray]]:
        from aprjax.blocks.dot import integer_matmul

        found = []
        for sample in _samples(asked):
            x = _activations(asked, sample.values.shape[1])
            quantized = quantize_q8_k(x)
            rounded = np.asarray(quantized.codes, np.float64) * np.asarray(quantized.scale, np.float64)[..., None]
            weights = sample.values.astype(np.float64).T
            ours = np.asarray(integer_matmul(sample.tensor.block_type, sample.packed, x), np.float64)
            found.append((sample, ours, rounded.reshape(x.shape) @ weights, x.astype(np.float64) @ weights))
        return found

    return asked.bench.once("products", make)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@measures("APRJAX-Q8K-002", "APRJAX-Q8K-003")
def products(asked: Asked) -> Measurement:
    """The integer product against float64 of the same numbers, and against activations that were not rounded."""
    if not _samples(asked):
        return Measurement(unmeasured=NONE)
    found = _products(asked)
    if not all(np.isfinite(ours).all() for _, ours, _, _ in found):
        return Measurement(failed="a product of the model's rows is no number")
    return Measurement(
        {
            "largest_rel_l2": max(_relative(ours, exact) for _, ours, exact, _ in found),
            "largest_rounding": max(_relative(exact, free) for _, _, exact, free in found),
        },
        _named([sample for sample, *_ in found]),
    )


@measures("FALSIFY-APR-GGUF-PARITY-005")
def floats_stay_floats(asked: Asked) -> Measurement:
    """A float32 matrix is multiplied as floats, by the model's own arithmetic: its activations are not rounded."""
    import jax.numpy as jnp

    from aprjax.blocks.relay import relay
    from aprjax.qwen2.arithmetic import preset
    from aprjax.qwen2.model import precision_scope
    from aprjax.qwen2.modules import PackedWeight, multiply

    table = asked.bench.checkpoint("model").tensors["model.embed_tokens.weight"]
    values = np.ascontiguousarray(table.decode_rows(slice(0, ROWS)), np.float32)
    rows, columns = values.shape
    x = _activations(asked, columns)
    arithmetic = asked.bench.run_by[0] or preset("llama.cpp")
    weight = PackedWeight(relay("F32", values.view(np.uint8).reshape(rows, columns, 4)), (rows, columns))
    with precision_scope(arithmetic):
        ours = np.asarray(multiply(weight, jnp.asarray(x).astype(arithmetic.dtype), arithmetic), np.float64)
    return Measurement(
        {"rel_l2": _relative(ours, x.astype(np.float64) @ values.T.astype(np.float64))},
        f"{rows} embedding rows as float32, {arithmetic.name}",
    )
