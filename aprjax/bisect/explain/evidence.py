"""`Evidence`: a trace and the file that should have produced it, as hypotheses look at them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.cause import tensors_of
from aprjax.bisect.explain.activations import through_blocks
from aprjax.bisect.explain.evaluation import HEAD_STAGES, Applied, Evaluation, ordered, sources
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node, Scored
from aprjax.bisect.explain.nodes import NodeContext
from aprjax.bisect.explain.variant import Variant
from aprjax.bisect.noise.floor import FACTOR, SMALLEST
from aprjax.bisect.replay.judge import row_distances
from aprjax.bisect.replay.layers import visible_part
from aprjax.bisect.replay.report import NodeReport, NodeVerdict, ReplayReport
from aprjax.checkpoint.types import Checkpoint, EncodedTensor, ModelConfig
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.loading import head_tensor, pack
from aprjax.qwen2.model import bucket, precision_scope
from aprjax.qwen2.modules import PackedWeight
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import AnyTrace, Trace

# Decoded weights times float32: what activations quantized beforehand are multiplied by, and derivatives go through.
DECODED = PRESETS["float32"]
# Values of the trace that are kept: a layer of a prompt of some hundred tokens, several layers of a short one.
_KEPT_BYTES = 256 << 20
# Matrices that are kept, laid out for computing: those of two layers.
_KEPT_MATRICES = 14
# Rows of the logits that proposals are held to: 64 rows of 151,936 float64 are 78 MB.
_HEAD_ROWS = 64
# The norms of one layer, by stage: its own weight, and the one that a loader might take in its place.
_NORMS = {
    Stage.ATTN_NORM: ("model.layers.{}.input_layernorm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    Stage.FFN_NORM: ("model.layers.{}.post_attention_layernorm.weight", "model.layers.{}.input_layernorm.weight"),
    Stage.FINAL_NORM: ("model.norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
}


@dataclass
class Evidence:
    """What is known before any hypothesis: the trace, the file, and `replay`'s verdict on every node.

    Attributes:
        trace: the trace.
        checkpoint: the file that should have produced it.
        arithmetic: the preset that comes nearest to what computed it.
        replay: every node's verdict, distance and tolerance.
        accepted: the faults that were found so far; `base` has them applied.
    """

    trace: AnyTrace
    checkpoint: Checkpoint
    arithmetic: Arithmetic
    replay: ReplayReport
    accepted: tuple[Applied, ...] = ()
    base: Evaluation = field(init=False, repr=False)
    _nodes: dict[Node, NodeReport] = field(init=False, repr=False)
    _values: OrderedDict[Node, np.ndarray] = field(default_factory=OrderedDict, repr=False)
    _packed: OrderedDict[tuple[str, int], PackedWeight] = field(default_factory=OrderedDict, repr=False)
    _chains: dict[Node, tuple[Node, ...]] = field(default_factory=dict, repr=False)
    _before: dict[Node, float] = field(default_factory=dict, repr=False)
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._nodes = {(node.layer, node.stage): node for node in self.replay.nodes}
        self.base = Evaluation(self)
        self._present = set(self.trace)

    @property
    def config(self) -> ModelConfig:
        """The file's."""
        return self.checkpoint.config

    @property
    def positions(self) -> np.ndarray:
        """Of the rows of every stage up to the last residual: from 0 on."""
        return np.arange(len(self.trace.info.tokens))

    @cached_property
    def head_positions(self) -> tuple[int, ...]:
        """Of the rows of the final norm and the logits that are looked at: at most 64, evenly spread."""
        return tuple(self.trace.info.head_positions[row] for row in self._head_rows)

    @cached_property
    def _head_rows(self) -> tuple[int, ...]:
        count = len(self.trace.info.head_positions)
        chosen = set(np.linspace(0, count - 1, min(count, _HEAD_ROWS)).round().astype(int).tolist()) if count else set()
        # Where the logits differ most must be among them.
        for stage in HEAD_STAGES:
            node = self._nodes.get((OUTSIDE, stage))
            if node is not None and node.max_abs_at is not None:
                chosen.add(self.trace.info.head_positions.index(node.max_abs_at[0]))
        return tuple(sorted(chosen))

    # What the trace holds.

    def report(self, node: Node) -> NodeReport | None:
        """`replay`'s verdict on a node."""
        return self._nodes.get(node)

    def value(self, node: Node) -> Float[np.ndarray, "position width"] | None:
        """The trace's value; None where it has none."""
        if node not in self._present:
            return None
        if node not in self._values:
            self._values[node] = self._read(node)
            while len(self._values) > 1 and sum(v.nbytes for v in self._values.values()) > _KEPT_BYTES:
                self._values.popitem(last=False)
        self._values.move_to_end(node)
        return self._values[node]

    def _read(self, node: Node) -> np.ndarray:
        if node[1] not in HEAD_STAGES:
            return np.asarray(self.trace[node])
        if isinstance(self.trace, Trace):
            return np.concatenate([self.trace.rows(node, slice(row, row + 1)) for row in self._head_rows])
        return np.asarray(self.trace[node])[list(self._head_rows)]

    def trusted(self, node: Node) -> np.ndarray | None:
        """The trace's value as an input: None where it has none, or where its engine did not go on with it."""
        return None if node in self.doubtful else self.value(node)

    @cached_property
    def doubtful(self) -> frozenset[Node]:
        """Values that are in the dump but were not what the engine went on with (`replay`)."""
        found: set[Node] = set()
        layers = self.config.num_layers
        for node in self.replay.nodes:
            for name, source in sources((node.layer, node.stage), layers):
                if name in node.through and source in self._present:
                    found.add(source)
        return frozenset(found)

    @cached_property
    def finite(self) -> frozenset[Node]:
        """Unexplained nodes that can be measured: neither the value nor what the file gives is NaN or infinite."""
        return frozenset(node for node in self.unexplained if np.isfinite(self.before(node)))

    @property
    def unexplained(self) -> tuple[Node, ...]:
        """The nodes that the file does not explain, in execution order, whatever was accepted."""
        nodes = ((n.layer, n.stage) for n in self.replay.nodes if n.verdict is NodeVerdict.UNEXPLAINED)
        return ordered(nodes, self.config.num_layers)

    def chain(self, node: Node) -> tuple[Node, ...]:
        """The nodes that are computed on the way to a node, itself last: those that the trace lacks."""
        if node not in self._chains:
            seen: set[Node] = {node}
            left = [node]
            while left:
                for _, source in sources(left.pop(), self.config.num_layers):
                    if source not in seen and (source not in self._present or source in self.doubtful):
                        seen.add(source)
                        left.append(source)
            self._chains[node] = ordered(seen, self.config.num_layers)
        return self._chains[node]

    def stages_behind(self, node: Node) -> frozenset[Stage]:
        """The stages of `chain`: a hypothesis concerns the node if it changes one of them."""
        return frozenset(stage for _, stage in self.chain(node))

    # What the file gives.

    def expected(self, node: Node) -> Float[np.ndarray, "position width"]:
        """What the file gives from the trace's inputs, with the accepted faults."""
        return self.base.value(node)

    def inputs(self, node: Node) -> dict[str, np.ndarray]:
        """A node's inputs by stage; "previous" is the layer's own input."""
        layers = self.config.num_layers
        return {name: self.base.given(source) for name, source in sources(node, layers)}

    def tensors(self, node: Node) -> tuple[EncodedTensor, ...]:
        """The tensors that a stage reads; those that the file lacks are left out."""
        found = []
        for name in tensors_of(*node):
            tensor = self.tensor(name)
            if tensor is not None:
                found.append(tensor)
        return tuple(found)

    def tensor(self, name: str) -> EncodedTensor | None:
        """A tensor by its canonical name; the head may be the embedding."""
        return head_tensor(self.checkpoint) if name == "lm_head.weight" else self.checkpoint.tensors.get(name)

    def residual(self, node: Node, evaluation: Evaluation) -> float:
        """Largest relative L2 of any position; infinite where something is not finite."""
        value = self.value(node)
        assert value is not None
        with np.errstate(all="ignore"):
            expected = visible_part(node[1], evaluation.value(node))
            distances = row_distances(visible_part(node[1], value), expected)
        worst = float(distances.max()) if distances.size else 0.0
        return worst if np.isfinite(worst) else np.inf

    def before(self, node: Node) -> float:
        """The residual with the accepted faults alone."""
        if node not in self._before:
            self._before[node] = self.residual(node, self.base)
        return self._before[node]

    def tolerance(self, node: Node) -> float:
        """What rounding explains at a node: `replay`'s tolerance.

        Where the file explains the node, at least what float64 sums differ by from the engine's: proposals are
        evaluated with them.
        """
        report = self._nodes[node]
        known = max(report.tolerance or 0.0, FACTOR * SMALLEST)
        if report.verdict.explained and not any(
            change.touches(step) for change in self.accepted for step in self.chain(node)
        ):
            return max(known, FACTOR * self.before(node))
        return known

    def accept(self, change: Applied) -> None:
        """Applies a fault for good."""
        self.base = self.base.with_change(change)
        self.accepted = (*self.accepted, change)
        touched = [node for node in self._before if any(change.touches(step) for step in self.chain(node))]
        for node in touched:
            del self._before[node]

    @contextmanager
    def supposing(self, *changes: Applied) -> Iterator[None]:
        """Inside the block, these faults count as accepted."""
        base, before, accepted = self.base, self._before, self.accepted
        self._before = dict(before)
        try:
            for change in changes:
                self.accept(change)
            yield
        finally:
            self.base, self._before, self.accepted = base, before, accepted

    def score(self, hypothesis: Hypothesis, candidate: Candidate, node: Node) -> Scored:
        """What a proposal leaves at one node."""
        trial = self.base.with_change(Applied(candidate.change, hypothesis.stages, candidate.scope))
        return Scored(hypothesis, candidate, self.residual(node, trial), self.before(node), self.tolerance(node))

    # What nodes are computed with.

    def vector(self, name: str, variant: Variant) -> np.ndarray | None:
        """A norm's or a bias's values, float64."""
        given = variant.weights.get(name, self.checkpoint.tensors.get(name))
        if given is None:
            return None
        values = given.decode() if isinstance(given, EncodedTensor) else given
        return np.asarray(values, np.float64).reshape(-1)

    def node_context(self, node: Node, variant: Variant) -> NodeContext:
        """What a node that is no matrix product is computed with."""
        layer, stage = node
        context = NodeContext(np, self.config, self.arithmetic.kv_cache == "float16")
        if stage in _NORMS:
            own, other = (name.format(layer % self.config.num_layers) for name in _NORMS[stage])
            return replace(context, norm=self.vector(own, variant), other_norm=self.vector(other, variant))
        if stage is not Stage.QKV_BIAS:
            return context
        config = self.config
        widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        names = tensors_of(layer, stage)
        biases = [self.vector(name, variant) for name in names]
        zeros = [np.zeros(heads * config.head_dim) for heads in widths]
        return replace(
            context, bias=np.concatenate([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
        )

    def embedded(self, variant: Variant) -> np.ndarray:
        """The tokens' rows of the embedding."""
        from aprjax.qwen2.loading import embed

        name = "model.embed_tokens.weight"
        given = variant.weights.get(name)
        tokens = list(self.trace.info.tokens)
        if isinstance(given, EncodedTensor):
            return embed(replace(self.checkpoint, tensors={**self.checkpoint.tensors, name: given}), tokens)
        return embed(self.checkpoint, tokens) if given is None else np.asarray(given)[tokens]

    def product(self, node: Node, x: np.ndarray, variant: Variant) -> np.ndarray:
        """A matrix product of a stage, `[position, out]` in float64, as the arithmetic has it."""
        kind = variant.activations
        names = tensors_of(*node)
        if node[1] is Stage.LM_HEAD and variant.head == "embedding":
            names = ("model.embed_tokens.weight",)
        parts = []
        for name in names:
            weight = self.packed(name, variant)
            fed = x if kind is None else through_blocks(x, kind, weight.blocks.name)
            arithmetic = self.product_arithmetic if kind is None else DECODED
            padded = np.zeros((bucket(len(x)), x.shape[1]), arithmetic.dtype)
            padded[: len(x)] = fed
            parts.append(self._multiplied(weight, padded, arithmetic))
        return np.concatenate(parts, axis=1)[: len(x)].astype(np.float64)

    @cached_property
    def product_arithmetic(self) -> Arithmetic:
        """Without an engine's order of sums: the same numbers to the rounding that the floors allow, and cheaper."""
        return replace(self.arithmetic, name="product", exact=False, kernels=(), vectors="avx2")

    @staticmethod
    def _multiplied(weight: PackedWeight, x: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
        from aprjax.bisect.explain.programs import multiplied

        with precision_scope(arithmetic):
            return np.asarray(multiplied(weight, x, arithmetic=arithmetic))

    def packed(self, name: str, variant: Variant) -> PackedWeight:
        """A matrix, laid out for computing."""
        given = variant.weights.get(name)
        tensor = self.tensor(name) if given is None else given
        key = (name, 0 if given is None else id(given))
        if key not in self._packed or given is not None:
            self._packed[key] = pack(tensor) if isinstance(tensor, EncodedTensor) else _packed_values(name, tensor)
            while len(self._packed) > _KEPT_MATRICES:
                self._packed.popitem(last=False)
        self._packed.move_to_end(key)
        return self._packed[key]


def _packed_values(name: str, values: Any) -> PackedWeight:
    from aprjax.blocks import encode

    values = np.ascontiguousarray(values, np.float32)
    return pack(EncodedTensor(name, values.shape, "F32", encode("F32", values)))
