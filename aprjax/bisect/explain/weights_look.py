"""One matrix of one unexplained product: the trace's numbers, the file's, and predictions from some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from aprjax.bisect.cause import MATMUL_STAGES, tensors_of
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Node
from aprjax.bisect.explain.variant import Variant
from aprjax.bisect.explanations.pair import spread
from aprjax.blocks import block_format, dequantize, encode
from aprjax.checkpoint.types import CheckpointError, EncodedTensor
from aprjax.qwen2.kernels import activation_block, through_blocks
from aprjax.qwen2.model import precision_scope

# Rows of a matrix that a prediction is first tried on.
SAMPLED = 16
# A prediction from sampled rows that leaves more than this of them is not worth computing the whole product for.
# Rounding leaves less than a hundredth; predictions that have nothing to do with the values leave the root of two.
WORTH = 0.05
# Matrices that have to be decoded whole have no more elements: 512 MiB of float32.
WHOLE_LIMIT = 1 << 27
# A column of a product differs where it is off by so many times what rounding adds up to over a position.
_OFF = 30.0


@dataclass
class Look:
    """One matrix at one node.

    Attributes:
        evidence: the trace and the file.
        node: the product.
        tensor: the matrix `[out, in]`, as the file has it.
        part: its columns of the node's value.
        x: the trace's inputs, `float32[position, in]`.
        found: the trace's value, `float64[position, out]`.
        expected: what the file gives, `float64[position, out]`.
    """

    evidence: Evidence
    node: Node
    tensor: EncodedTensor
    part: slice
    x: Float[np.ndarray, "position in"]
    found: Float[np.ndarray, "position out"]
    expected: Float[np.ndarray, "position out"]

    @property
    def name(self) -> str:
        """The matrix's canonical name: the head's own, where it is the embedding."""
        names = tensors_of(*self.node)
        return names[0] if len(names) == 1 else self.tensor.name

    @cached_property
    def scale(self) -> float:
        """Root mean square of what the file gives; of a massive position no more than the others have."""
        return float(np.median(np.sqrt(np.square(self.expected).mean(axis=1)))) or 1.0

    @cached_property
    def weights(self) -> Float[np.ndarray, " position"]:
        """Factors that make the positions equally large, so that a massive one hides nothing."""
        size = np.sqrt(np.square(self.expected).mean(axis=1))
        return 1.0 / np.where(size > 0, size, 1.0)

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Found and expected, positions equally large: `float64[out, position]`."""
        return (self.found * self.weights[:, None]).T, (self.expected * self.weights[:, None]).T

    @cached_property
    def wrong(self) -> Int[np.ndarray, " rows"]:
        """The rows of the matrix whose products are not the file's."""
        ours, theirs = self.columns
        allowed = _OFF * self.evidence.tolerance(self.node) * np.sqrt(len(self.x))
        return np.flatnonzero(np.linalg.norm(ours - theirs, axis=1) > allowed)

    @property
    def per_row(self) -> bool:
        """Whether the rows' bytes follow each other, so that rows can be moved without being decoded."""
        try:
            return self.tensor.packed().size > 0
        except CheckpointError:
            return False

    @cached_property
    def whole(self) -> Float[np.ndarray, "out in"]:
        """The decoded matrix."""
        return self.tensor.decode()

    def sample(self, count: int = SAMPLED) -> Int[np.ndarray, " rows"]:
        """Some rows whose products are wrong, evenly spread."""
        known = self.wrong if self.wrong.size else np.arange(self.tensor.shape[0])
        return known[spread(known.size, count)]

    def activations(self, block_type: str) -> Float[np.ndarray, "position in"]:
        """The inputs as they are multiplied by weights of a block type: quantized or not."""
        return activations(self.evidence, self.x, block_type)

    def left(self, rows: np.ndarray, values: np.ndarray, block_type: str) -> float:
        """What some predicted rows `[rows, in]` of the matrix leave of their products, relative."""
        with np.errstate(all="ignore"):
            predicted = self.activations(block_type) @ values.astype(np.float64).T * self.weights[:, None]
            found = self.found[:, rows] * self.weights[:, None]
            left = float(np.linalg.norm(found - predicted) / max(np.linalg.norm(predicted), 1e-300))
        return left if np.isfinite(left) else np.inf

    def candidate(
        self,
        sentence: str,
        weights: dict[str, EncodedTensor | np.ndarray],
        nodes: frozenset[Node] | None = None,
        /,
        **told: object,
    ) -> Candidate:
        """A proposal that other weights were multiplied."""
        return Candidate(sentence, with_weights(weights), dict(told), scope=nodes or frozenset({self.node}))

    def proposals(
        self,
        sentence: str,
        rows_of: Callable[[np.ndarray], np.ndarray],
        whole: Callable[[], np.ndarray],
        **told: object,
    ) -> Iterator[Candidate]:
        """Proposes other values for the matrix: as they are, or encoded again as its type; whichever its rows bear out.

        Args:
            sentence: what happened to it.
            rows_of: the predicted values of some rows.
            whole: all of them.
            told: the parameters.
        """
        rows = self.sample()
        values = rows_of(rows)
        plain = self.left(rows, values, "F32")
        if plain > 4 * WORTH:  # an encoder moves values by no more than a tenth
            return
        own = block_format(self.tensor.block_type)
        again = np.inf
        # Rows are encoded one by one only where they begin with a block.
        if own.quantized and own.encode is not None and values.shape[1] % own.block_size == 0:
            again = self.left(rows, encoded(values, own.name), own.name)
        if plain <= WORTH and plain <= again:
            yield self.candidate(sentence, {self.name: np.ascontiguousarray(whole(), np.float32)}, **told)
        # Some rows may come through an encoder unchanged, and others not.
        if again <= WORTH and again <= 2 * plain:
            tensor = as_encoded(self.tensor, whole())
            yield self.candidate(f"{sentence}, and encoded again as {own.name}", {self.name: tensor}, **told)


def looks(evidence: Evidence, node: Node) -> tuple[Look, ...]:
    """The matrices of a product whose results are not all the file's; nothing for other nodes."""
    if node[1] not in MATMUL_STAGES:
        return ()
    key = ("weights", node, len(evidence.accepted))
    if key not in evidence.programs:
        for old in [k for k in evidence.programs if isinstance(k, tuple) and k[:1] == ("weights",)]:
            del evidence.programs[old]
        evidence.programs[key] = tuple(looks_afresh(evidence, node))
    return evidence.programs[key]


def looks_afresh(evidence: Evidence, node: Node) -> Iterator[Look]:
    """`looks`, not kept."""
    found = evidence.value(node)
    inputs = list(evidence.inputs(node).values())
    tensors = evidence.tensors(node)
    if found is None or len(inputs) != 1 or len(tensors) != len(tensors_of(*node)):
        return
    x = np.asarray(inputs[0], np.float32)
    expected = np.asarray(evidence.expected(node), np.float64)
    if not (np.isfinite(found).all() and np.isfinite(x).all()) or len(x) != len(found):
        return
    begin = 0
    for tensor in tensors:
        part = slice(begin, begin + tensor.shape[0])
        begin = part.stop
        with np.errstate(all="ignore"):
            look = Look(evidence, node, tensor, part, x, found[:, part].astype(np.float64), expected[:, part])
            if np.isfinite(look.expected).all() and look.wrong.size:
                yield look


def activations(evidence: Evidence, x: np.ndarray, block_type: str) -> np.ndarray:
    """Inputs as an arithmetic multiplies them by weights of a block type, `float64[position, in]`."""
    arithmetic = evidence.product_arithmetic
    partner = activation_block(block_type, x.shape[1], arithmetic)
    if partner is None:
        return x.astype(np.float64)
    with precision_scope(arithmetic):
        return np.asarray(through_blocks(jnp.asarray(x, "float32"), partner, arithmetic), np.float64)


def with_weights(weights: dict[str, EncodedTensor | np.ndarray]) -> Callable[[Variant], Variant]:
    """The change that puts other weights in the place of the file's."""
    return lambda variant: replace(variant, weights={**variant.weights, **weights})


def encoded(values: np.ndarray, block_type: str) -> np.ndarray:
    """Values after a passage through a block type."""
    finite = np.ascontiguousarray(np.where(np.isfinite(values), values, 0.0), np.float32)
    return dequantize(block_type, encode(block_type, finite), values.shape)


def as_encoded(tensor: EncodedTensor, values: np.ndarray) -> EncodedTensor:
    """Other values under a tensor's name, in its block type."""
    values = np.ascontiguousarray(values, np.float32)
    return EncodedTensor(tensor.name, values.shape, tensor.block_type, encode(tensor.block_type, values))


def with_rows(tensor: EncodedTensor, source: np.ndarray) -> EncodedTensor | np.ndarray:
    """A matrix whose row i is the given one's row `source[i]`, its bytes unchanged; -1 stands for a row of zeros."""
    try:
        packed = tensor.packed()
    except CheckpointError:
        values = tensor.decode()[np.maximum(source, 0)]
        values[source < 0] = 0
        return values
    moved = np.ascontiguousarray(packed[np.maximum(source, 0)])
    # Every block type decodes zero bytes to zeros: the scale is one of the fields.
    moved[source < 0] = 0
    return replace(tensor, data=moved.reshape(-1))
