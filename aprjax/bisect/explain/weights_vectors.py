"""Accidents of norms' weights and biases: from a few positions the vector that ran is known, element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from aprjax.bisect.cause import tensors_of
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Node, Parameter
from aprjax.bisect.explain.proposals import with_error
from aprjax.bisect.explain.unseen import FACTOR_ERROR
from aprjax.bisect.explain.weights_look import with_weights
from aprjax.bisect.explanations.permutations import rope_sources
from aprjax.checkpoint.types import EncodedTensor
from aprjax.qwen2.stages import Stage

NORMS = (Stage.ATTN_NORM, Stage.FFN_NORM, Stage.FINAL_NORM)
VECTORS = (*NORMS, Stage.QKV_BIAS)
# A vector that all positions agree on leaves no more of their values than this, relative.
_CONSISTENT = 1e-3
# An element differs where it is off by more than this share of the vector's root mean square.
_OFF = 1e-4
# A prediction is met when it leaves no more than this, relative.
_MET = 1e-3
_NAMED = 4
# Elements that are named one by one, before it is another vector.
_MOST_REPLACED = 16


@dataclass
class VectorLook:
    """One vector at one node.

    Attributes:
        evidence: the trace and the file.
        node: where it is multiplied or added.
        tensor: the file's.
        ran: what ran, by least squares over the positions, `float64[n]`.
        left: what that leaves of the trace's values, relative.
    """

    evidence: Evidence
    node: Node
    tensor: EncodedTensor
    ran: Float[np.ndarray, " n"]
    left: float

    @cached_property
    def own(self) -> Float[np.ndarray, " n"]:
        """The file's values."""
        return self.tensor.decode().reshape(-1).astype(np.float64)

    @cached_property
    def wrong(self) -> Int[np.ndarray, " differing"]:
        """Elements that are not the file's."""
        size = float(np.sqrt(np.square(self.own).mean())) or 1.0
        return np.flatnonzero(np.abs(self.ran - self.own) > _OFF * size)

    @property
    def name(self) -> str:
        """Without the layer: `input_layernorm`, `k_proj.bias`."""
        if self.tensor.name.endswith(".bias"):
            return ".".join(self.tensor.name.split(".")[-2:])
        return self.tensor.name.removesuffix(".weight").rpartition(".")[2]

    def met(self, predicted: np.ndarray) -> bool:
        """Whether a vector is the one that ran."""
        missed = np.linalg.norm(self.ran - predicted)
        return bool(missed <= _MET * min(np.linalg.norm(self.ran - self.own), np.linalg.norm(predicted) or 1.0))

    def candidate(self, sentence: str, values: np.ndarray, **told: object) -> Candidate:
        """A proposal that this vector ran."""
        change = with_weights({self.tensor.name: np.ascontiguousarray(values, np.float64)})
        return Candidate(sentence, change, dict(told), scope=frozenset({self.node}))

    def proposed(self, sentence: str, values: np.ndarray, **told: object) -> Iterator[Candidate]:
        """The same, if it is met."""
        if self.met(values):
            yield self.candidate(sentence, values, **told)


def vector_looks(evidence: Evidence, node: Node) -> Iterator[VectorLook]:
    """The vectors of a norm or of the biases that are not the file's; nothing for other nodes."""
    found = evidence.value(node)
    if node[1] not in VECTORS or found is None or len(found) < 2 or not np.isfinite(found).all():
        return
    expected = np.asarray(evidence.expected(node), np.float64)
    tensors = evidence.tensors(node)
    if not np.isfinite(expected).all() or len(tensors) != len(tensors_of(*node)):
        return
    y, begin = found.astype(np.float64), 0
    for tensor in tensors:
        part = slice(begin, begin + tensor.size)
        begin = part.stop
        own = tensor.decode().reshape(-1).astype(np.float64)
        if node[1] is Stage.QKV_BIAS:
            bare = expected[:, part] - own
            ran = (y[:, part] - bare).mean(axis=0)
            again = bare + ran
        else:
            bare = np.divide(expected[:, part], own, out=np.zeros_like(expected[:, part]), where=own != 0)
            size = np.square(bare).sum(axis=0)
            ran = np.divide((y[:, part] * bare).sum(axis=0), size, out=own.copy(), where=size > 0)
            again = bare * ran
        left = float(np.linalg.norm(y[:, part] - again) / max(np.linalg.norm(again), 1e-300))
        look = VectorLook(evidence, node, tensor, ran, left)
        # Positions that do not agree on a vector had no such thing: the fault is another.
        if left <= _CONSISTENT and look.wrong.size:
            yield look


def each_vector(test: Callable[[VectorLook], Iterator[Candidate]]) -> Callable[[Evidence, Node], Iterator[Candidate]]:
    """A hypothesis about every vector of a node."""

    def run(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        with np.errstate(all="ignore"):
            for look in vector_looks(evidence, node):
                yield from test(look)

    return run


def vector_zeroed(look: VectorLook) -> Iterator[Candidate]:
    """Zeros, everywhere or in some elements."""
    values = look.own.copy()
    values[look.wrong] = 0
    size = float(np.sqrt(np.square(look.own).mean()))
    if np.abs(look.ran[look.wrong]).max() <= _OFF * size:
        yield look.candidate(f"{_elements(look)} zero", values, elements=int(look.wrong.size))


def vector_scaled(look: VectorLook) -> Iterator[Candidate]:
    """One factor for all elements, or for those that differ."""
    own, ran = look.own[look.wrong], look.ran[look.wrong]
    size = float(own @ own)
    if not size or look.wrong.size < 2:
        return
    factor = float(own @ ran) / size
    # As far as what is left could push it, like every fitted number's.
    error = float(np.linalg.norm(ran - factor * own) / np.sqrt(size)) + FACTOR_ERROR * abs(factor)
    values = look.own.copy()
    values[look.wrong] *= factor
    words = f"{_elements(look)} multiplied by {with_error(factor, error)}"
    if factor:
        yield from look.proposed(words, values, factor=Parameter(factor, error, 1.0))


def vector_added(look: VectorLook) -> Iterator[Candidate]:
    """One number added to all elements, or to those that differ."""
    if look.wrong.size < 2:
        return
    delta = look.ran[look.wrong] - look.own[look.wrong]
    constant = float(np.median(delta))
    error = float(np.sqrt(np.square(delta - constant).mean())) + FACTOR_ERROR * abs(constant)
    values = look.own.copy()
    values[look.wrong] += constant
    words = f"to {_elements(look, verb=False)} {with_error(constant, error)} is added"
    yield from look.proposed(words, values, constant=Parameter(constant, error, 0.0))


def vector_of_another(look: VectorLook) -> Iterator[Candidate]:
    """Another vector of the file: another layer's norm, k's bias for v's."""
    for name, other in look.evidence.checkpoint.tensors.items():
        if name == look.tensor.name or tuple(other.shape) != tuple(look.tensor.shape):
            continue
        values = other.decode().reshape(-1)
        if look.met(values):
            yield look.candidate(f"{name} stands in the place of {look.name}", values, tensor=name)
            return


def vector_shifted(look: VectorLook) -> Iterator[Candidate]:
    """Off by one."""
    for step in (1, -1):
        words = f"{look.name} is shifted by one element {'up' if step > 0 else 'down'}"
        yield from look.proposed(words, np.roll(look.own, step), by=step)


def vector_reversed(look: VectorLook) -> Iterator[Candidate]:
    """The last element first."""
    yield from look.proposed(f"{look.name} is in reverse order", look.own[::-1])


def vector_rotary(look: VectorLook) -> Iterator[Candidate]:
    """The rotary halves of each head interleaved, or taken apart: of the biases of q and k."""
    head = look.evidence.config.head_dim
    if look.name not in ("q_proj.bias", "k_proj.bias") or look.own.size % head or head % 2:
        return
    for order, source in rope_sources(look.own.size, head).items():
        how = "interleaved" if order == "neighbours" else "taken apart"
        yield from look.proposed(
            f"the rotary halves of each head of {look.name} are {how}", look.own[source], order=order
        )


def vector_heads(look: VectorLook) -> Iterator[Candidate]:
    """Whole heads of a bias in other places."""
    head = look.evidence.config.head_dim
    if not look.tensor.name.endswith(".bias") or look.own.size % head:
        return
    ours, theirs = look.ran.reshape(-1, head), look.own.reshape(-1, head)
    order = np.square(ours[:, None] - theirs[None]).sum(axis=2).argmin(axis=1)
    if not np.array_equal(order, np.arange(order.size)):
        yield from look.proposed(
            f"the heads of {look.name} are permuted", theirs[order].reshape(-1), order=order.tolist()
        )


def vector_permuted(look: VectorLook) -> Iterator[Candidate]:
    """The same numbers in another order."""
    source = np.empty(look.own.size, np.int64)
    source[np.argsort(look.ran, kind="stable")] = np.argsort(look.own, kind="stable")
    if look.own.size >= 8:
        yield from look.proposed(f"the elements of {look.name} are in another order", look.own[source])


def vector_replaced(look: VectorLook) -> Iterator[Candidate]:
    """Another vector, which all positions agree on."""
    if look.left > _CONSISTENT / 10:
        return
    values = look.own.copy()
    values[look.wrong] = look.ran[look.wrong]
    if look.wrong.size <= _MOST_REPLACED:
        named = ", ".join(f"{i}: {look.ran[i]:.6g} for {look.own[i]:.6g}" for i in look.wrong[:_NAMED].tolist())
        more = " …" if look.wrong.size > _NAMED else ""
        count = "1 element" if look.wrong.size == 1 else f"{look.wrong.size} elements"
        words = f"other numbers stand at {count} of {look.name} ({named}{more})"
    else:
        cosine = float(look.ran @ look.own / (np.linalg.norm(look.ran) * np.linalg.norm(look.own) or 1.0))
        words = f"{look.name} is another vector at {look.wrong.size} of {look.own.size} elements (cosine {cosine:.4g})"
    yield look.candidate(words, values, elements=int(look.wrong.size), first=int(look.wrong[0]))


def _elements(look: VectorLook, *, verb: bool = True) -> str:
    every = look.wrong.size == look.own.size or not look.own[np.setdiff1d(np.arange(look.own.size), look.wrong)].any()
    if every:
        return f"{look.name} is" if verb else f"every element of {look.name}"
    if look.wrong.size == 1:
        return f"element {look.wrong[0]} of {look.name}{' is' if verb else ''}"
    return f"{look.wrong.size} elements of {look.name} (the first is {look.wrong[0]}){' are' if verb else ''}"
