"""Evaluates nodes of a trace from the trace's own inputs, under changed computations.

A node's inputs are the trace's values; one that the trace lacks, or that its engine did not go on with, is computed
likewise, and so on back to the nearest value that is there. So a proposal costs as much as the nodes that it
changes, from a rotation alone to whole layers where a trace holds nothing between their outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain.hypothesis import Change, Node
from aprjax.bisect.explain.nodes import needed_inputs, node_function
from aprjax.bisect.explain.variant import SOUND, Variant
from aprjax.qwen2.stages import OUTSIDE, STAGE_INPUTS, Stage

if TYPE_CHECKING:
    from aprjax.bisect.explain.evidence import Evidence

# Rows of the last layer's output that these stages are computed for.
HEAD_STAGES = (Stage.FINAL_NORM, Stage.LM_HEAD)


@dataclass(frozen=True)
class Applied:
    """A change of the computation, and where.

    Attributes:
        change: what is done to a node's variant.
        stages: whose computation it changes.
        scope: the nodes; None: all of these stages.
    """

    change: Change
    stages: frozenset[Stage]
    scope: frozenset[Node] | None = None

    def touches(self, node: Node) -> bool:
        """Whether the node's own computation is changed."""
        return node[1] in self.stages and (self.scope is None or node in self.scope)


def sources(node: Node, layers: int, variant: Variant = SOUND) -> Iterator[tuple[str, Node]]:
    """The names and nodes of what a node is computed from; "previous" is the layer's input."""
    layer, stage = node
    inside = OUTSIDE if stage in HEAD_STAGES else layer
    for name in needed_inputs(stage, variant, STAGE_INPUTS[stage]):
        if name != "previous":
            yield name, (inside, Stage(name))
        elif layer == 0:
            yield name, (OUTSIDE, Stage.EMBEDDING)
        else:
            yield name, ((layers if layer == OUTSIDE else layer) - 1, Stage.POST_FFN_RESIDUAL)


@dataclass
class Evaluation:
    """Nodes under some changes. Values are computed when they are asked for.

    Attributes:
        evidence: the trace and the file.
        changes: in the order in which they are made.
        below: the same without the last change: what it does not touch is taken from there.
    """

    evidence: Evidence
    changes: tuple[Applied, ...] = ()
    below: Evaluation | None = None
    _values: dict[Node, np.ndarray] = field(default_factory=dict, repr=False)
    _variants: dict[tuple[int, ...], Variant] = field(default_factory=dict, repr=False)

    def with_change(self, change: Applied) -> Evaluation:
        """The same with one more change."""
        return Evaluation(self.evidence, (*self.changes, change), self)

    def variant(self, node: Node) -> Variant:
        """How the node itself is computed."""
        touching = tuple(index for index, change in enumerate(self.changes) if change.touches(node))
        if touching not in self._variants:
            variant = SOUND
            for index in touching:
                variant = self.changes[index].change(variant)
            self._variants[touching] = variant
        return self._variants[touching]

    def affects(self, node: Node) -> bool:
        """Whether the last change has to do with the node, perhaps through stages that the trace lacks."""
        return bool(self.changes) and any(self.changes[-1].touches(step) for step in self.evidence.chain(node))

    def value(self, node: Node) -> Float[np.ndarray, "position width"]:
        """What the file gives at a node from the trace's inputs, under the changes, in float64."""
        if self.below is not None and not self.affects(node):
            return self.below.value(node)
        if node not in self._values:
            self._forget(node)
            # From the front, not by recursion: a trace may lack many layers.
            for step in self.evidence.chain(node):
                if step not in self._values and (step == node or self._kept(step, node)):
                    self._values[step] = self._compute(step)
            if node not in self._values:
                self._values[node] = self._compute(node)
        return self._values[node]

    def _kept(self, step: Node, node: Node) -> bool:
        return step[1] is Stage.POST_FFN_RESIDUAL and step[0] != node[0]

    def _forget(self, node: Node) -> None:
        """Lets go of other layers' values but for their outputs: one layer's are in memory."""
        gone = [other for other in self._values if other[0] != node[0] and other[1] is not Stage.POST_FFN_RESIDUAL]
        for other in gone:
            del self._values[other]

    def given(self, node: Node) -> np.ndarray:
        """An input: the trace's value, or what stands in for it."""
        own = self.evidence.trusted(node)
        return self.value(node) if own is None else own

    def _compute(self, node: Node) -> np.ndarray:
        stage = node[1]
        evidence, variant = self.evidence, self.variant(node)
        if stage is Stage.EMBEDDING:
            value = evidence.embedded(variant).astype(np.float64)
        else:
            inputs: dict[str, Any] = {
                name: self.given(source).astype(np.float64)
                for name, source in sources(node, evidence.config.num_layers, variant)
            }
            if stage is Stage.FINAL_NORM:
                inputs["previous"] = inputs["previous"][list(evidence.head_positions)]
            if stage in MATMUL_STAGES:
                (x,) = inputs.values()
                value = evidence.product(node, x, variant)
            else:
                here = evidence.node_context(node, variant)
                with np.errstate(all="ignore"):
                    value = node_function(stage)(inputs, variant, here, evidence.positions)
        factor = variant.factors.get(stage)
        return value if factor is None else value * factor


def ordered(nodes: Iterable[Node], layers: int) -> tuple[Node, ...]:
    """In execution order: the embedding, the layers, the final norm and the head."""
    rank = {stage: index for index, stage in enumerate(Stage)}

    def key(node: Node) -> tuple[int, int]:
        layer, stage = node
        return (layers if stage in HEAD_STAGES else layer, rank[stage])

    return tuple(sorted(set(nodes), key=key))
